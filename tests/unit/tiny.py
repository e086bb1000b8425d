"""Kernels of a few bytes: enough to see a whole VM run on any /dev/kvm, also one that interprets kernels."""

import gc
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pileus.config.model import CpusConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig

BASE = 0x100000  # where the code goes, and its entry point
COUNTER = 0x200000  # a byte of RAM that the boot-counting code uses
XEN_PHYS32_ENTRY = 18

# 32-bit code (PVH) unless said otherwise.
SAY_A = bytes.fromhex("66baf803 b041 ee")  # out 0x3f8, 'A'
POWER_OFF = bytes.fromhex("66bac003 b034 ee f4")  # out 0x3c0, 0x34; hlt
ACPI_RESET = bytes.fromhex("66bac003 b001 ee f4")
POWER_OFF_THEN_RESET = bytes.fromhex("66bac003 b034 ee b001 ee f4")  # both, before anyone has looked
I8042_RESET = bytes.fromhex("b0fe e664 f4")
TRIPLE_FAULT = bytes.fromhex(
    "0f0b"
)  # ud2: the boot IDT has no handler for it, nor for what follows from that
SPIN = bytes.fromhex("ebfe")
PANIC = bytes.fromhex("66ba0505 b001 ee")  # out 0x505, 1
READ_I8042 = bytes.fromhex("e464")
ENTER_A_HOLE = bytes.fromhex("b8000000d0 ffe0")  # jmp 0xd0000000, where neither RAM nor a device is
SPIN_BACK = bytes.fromhex("ebf8")  # after COUNT: jmp to it
COUNT = bytes.fromhex("fe0500002000")  # inc byte [COUNTER]


def elf(code: bytes, *, pvh: bool = True) -> bytes:
    """An ELF64 kernel of ``code``, entered by PVH or, without the note, in 64-bit mode."""
    note = struct.pack("<III4sI", 4, 4, XEN_PHYS32_ENTRY, b"Xen\0", BASE)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, BASE, 64, 0, 0, 64, 56, 2 if pvh else 1, 0, 0, 0
    )
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, BASE, BASE, len(code), len(code), 0x1000)
    segments += struct.pack("<IIQQQQQQ", 4, 4, 0x800, 0, 0, len(note), len(note), 4)
    return ((header + segments).ljust(0x800, b"\0") + note).ljust(0x1000, b"\0") + code


def power_off_on_boot(number: int, otherwise: bytes) -> bytes:
    """Say A; do ``otherwise`` on all boots of one RAM before the given one, then power off."""
    compare = bytes.fromhex("803d00002000")  # cmp byte [COUNTER], number; je past ``otherwise``
    return SAY_A + COUNT + compare + bytes([number, 0x74, len(otherwise)]) + otherwise + POWER_OFF


def config(folder: Path, code: bytes, *, cpus: int = 1, pvh: bool = True, file: bool = False) -> VmConfig:
    """A VM of 16 MiB that runs ``code``, its serial port in ``folder``; its RAM, too, where ``file``."""
    kernel, ram = folder / "kernel", folder / "ram"
    kernel.write_bytes(elf(code, pvh=pvh))
    if file:
        ram.touch()
    return VmConfig(
        cpus=CpusConfig(boot=cpus),
        memory=MemoryConfig(size=16 << 20, file=str(ram) if file else None),
        payload=PayloadConfig(kernel=str(kernel)),
        serial=SerialConfig(mode="file", file=str(folder / "serial")),
    )


def thread_names() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            names.append((task / "comm").read_text().strip())
    return names


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


class Held(NamedTuple):
    """What this process has of the host."""

    files: int
    threads: int
    pages: int  # of address space, in units of a MiB: allocators move in smaller steps


def held() -> Held:
    """While no VM runs: threads that were joined, ours and KVM's, may still be on their way out."""
    gc.collect()
    wait_until(lambda: not any(name.startswith(("vcpu", "kvm-")) for name in thread_names()))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return Held(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), pages >> 8)

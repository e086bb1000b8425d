"""virtio-net over a TAP: packets and bytes a second, and CPU per packet, beside QEMU and a bare loop.

Everything runs on this very host. A driver in another process (``parts/net_driver.py``) shares memory with
the device and blasts packets through its queues, for pileus and QEMU alike: QEMU's guest is a halted CPU, its
device is set up and kicked by the qtest protocol. The bare loop calls write or read on the same TAP, without
rings: the kernel's own share. All is in a network namespace of its own, where the stack drops each frame.

With few cores the driver, the sender and everybody else compete; CPU per packet bears that better than rates.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from pathlib import Path

from support.bench import Options, Row
from support.host import ScriptError
from support.net_load import (
    CASES,
    DEVICE_CPU,
    DRIVER,
    FEATURES,
    INTERFACE,
    MEMORY,
    QUEUE_SIZE,
    RING_PARTS,
    RINGS,
    Case,
    Figure,
    driver,
    engine,
    expect,
    measure,
    namespace,
    python,
    rows,
    shared_memory,
)  # fmt: skip

GOALS = ("bench",)
QEMU, LOOP = "QEMU", "bare loop"
MMIO, MMIO_STRIDE, MMIO_COUNT, MAGIC = 0xFEB00000, 0x200, 8, 0x74726976  # of -M microvm
QUEUE_NOTIFY = 0x50
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8  # <linux/if_tun.h>
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def run(options: Options) -> list[Row]:
    if os.geteuid() != 0:
        raise ScriptError("making a network namespace and a TAP takes root")
    with namespace():
        return [row for case in CASES for row in _rows(case, options.runs or 5)]


def _rows(case: Case, runs: int) -> list[Row]:
    peers = {QEMU: _qemu} | ({LOOP: _loop} if case.mode != "rr" else {})
    goals = {QEMU: 1.0 if case.mode != "rr" else 0.0}
    return rows(case, {"pileus": engine, **peers}, goals, runs)


# -- QEMU ----------------------------------------------------------------------------------------------


def _qemu(case: Case) -> Figure:
    with (
        tempfile.TemporaryDirectory() as scratch,
        shared_memory() as fd,
        socket.socket(socket.AF_UNIX) as door,
    ):
        path = Path(scratch, "qtest")
        firmware = Path(scratch, "halt")
        firmware.write_bytes(b"\xfa\xf4\xeb\xfc" * 0x4000)  # cli; hlt; again: the CPU does nothing
        door.bind(str(path))
        door.listen()
        door.settimeout(20)
        process = subprocess.Popen(["taskset", "-c", str(DEVICE_CPU), *_qemu_command(path, firmware, fd)])
        try:
            qtest, _ = door.accept()
            with qtest:
                notify = _set_up(qtest)
                qtest.set_inheritable(True)
                return measure(driver(case, fd, (qtest.fileno(),) * 2, f"writel {notify:#x}"), process.pid)
        finally:
            process.kill()
            process.wait()


def _qemu_command(qtest: Path, firmware: Path, fd: int) -> list[str]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise ScriptError("no qemu-system-x86_64")
    memory = f"memory-backend-file,id=m,size={MEMORY},share=on,mem-path=/proc/{os.getpid()}/fd/{fd}"
    command = [program, "-M", "microvm,acpi=off,memory-backend=m", "-m", f"{MEMORY >> 20}M", "-accel", "tcg"]
    command += ["-bios", str(firmware), "-qtest", f"unix:{qtest}", "-qtest-log", "none"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-object", memory]
    command += ["-netdev", f"tap,id=n,ifname={INTERFACE},script=no,downscript=no,vhost=off"]
    command += ["-global", "virtio-mmio.force-legacy=false"]
    return [*command, "-device", "virtio-net-device,netdev=n,mac=2e:00:00:00:00:01"]


def _set_up(qtest: socket.socket) -> int:
    """Bring QEMU's device to DRIVER_OK with the features that it shares with ours; where it is kicked."""

    def ask(text: str) -> int:
        qtest.sendall(text.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += qtest.recv(4096)
        words = answer.split()
        if words[0] != b"OK":
            raise ScriptError(f"QEMU answers {answer.decode()} to {text}")
        return int(words[1], 16) if len(words) > 1 else 0

    bases = [MMIO + MMIO_STRIDE * index for index in range(MMIO_COUNT)]
    base = next(
        base for base in bases if ask(f"readl {base:#x}") == MAGIC and ask(f"readl {base + 8:#x}") == 1
    )

    def write(register: int, value: int) -> None:
        ask(f"writel {base + register:#x} {value:#x}")

    for status in (0, 1, 3):
        write(0x70, status)
    for word in (0, 1):
        write(0x14, word)
        offered = ask(f"readl {base + 0x10:#x}")
        write(0x24, word)
        write(0x20, offered & FEATURES[word])
    write(0x70, 11)
    if not ask(f"readl {base + 0x70:#x}") & 8:
        raise ScriptError("QEMU refuses the features")
    for index in (0, 1):
        write(0x30, index)
        write(0x38, QUEUE_SIZE)
        place = RINGS * (1 + index)
        for register, offset in zip((0x80, 0x90, 0xA0), RING_PARTS, strict=True):
            write(register, place + offset)
            write(register + 4, 0)
        write(0x44, 1)
    write(0x70, 15)
    return base + QUEUE_NOTIFY


# -- the kernel alone ----------------------------------------------------------------------------------


def _loop(case: Case) -> Figure:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        request = struct.pack("=16sH22x", INTERFACE.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(fd, TUNSETIFF, request)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", 12))
        fcntl.ioctl(fd, TUNSETOFFLOAD, 3)  # checksums, TSO4
        os.set_inheritable(fd, True)
        return _loop_rx(case, fd) if case.mode == "rx" else _loop_tx(case, fd)
    finally:
        os.close(fd)


def _loop_tx(case: Case, fd: int) -> Figure:
    alone = driver(case._replace(mode="plain-tx"), fd, (0, 0), "-")
    return measure(alone, alone.pid)


def _loop_rx(case: Case, fd: int) -> Figure:
    with shared_memory() as counter:
        words = ["plain-reader", fd, counter, 0, "-", INTERFACE, case.length, 0, 0]
        reader = python(DEVICE_CPU, DRIVER, *words)
        try:
            expect(reader, b"ready\n")
            return measure(driver(case._replace(mode="plain-rx"), counter, (0, 0), "-"), reader.pid)
        finally:
            reader.kill()
            reader.wait()

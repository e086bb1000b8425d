"""Cores of whole VMs, opened by gdb and drgn."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pileus.kvm.probe import OVERRIDE
from pileus.sdk.vm import VirtualMachine
from pileus.vm.core_notes import note
from tests.unit import tiny

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
TEXT = b"memory of a guest"
TEXT_AT = 0x300000
PML4, PDPT, DIRECTORY, VMCOREINFO_AT = 0x400000, 0x401000, 0x402000, 0x403000
TEXT_MAP = 0xFFFFFFFF80000000  # where Linux maps itself, from phys_base on
BASE = TEXT_MAP + 0x1000000  # and where its pages are here
PRESENT_WRITABLE, HUGE = 3, 1 << 7
# What a debugger of Linux needs of the note to find its way by page tables.
VMCOREINFO = f"""\
OSRELEASE=6.12.0-pileus
BUILD-ID=0123456789abcdef0123456789abcdef01234567
PAGESIZE=4096
KERNELOFFSET=0
SYMBOL(swapper_pg_dir)={TEXT_MAP + PML4:x}
NUMBER(phys_base)=0
NUMBER(pgtable_l5_enabled)=0
""".encode()


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The core of a VM of two vCPUs; the first of them runs in circles at ``tiny.BASE``."""
    monkeypatch.setenv(OVERRIDE, "1")
    (tmp_path / "kernel").write_bytes(tiny.elf(tiny.SPIN, pvh=False))
    ram = tmp_path / "ram"
    with ram.open("wb") as file:
        file.truncate(16 << 20)
        file.seek(TEXT_AT)
        file.write(TEXT)
        for at, data in tables().items():
            file.seek(at)
            file.write(data)
    memory = {"size": "16M", "file": ram}
    with VirtualMachine(kernel=tmp_path / "kernel", cpus=2, memory=memory) as vm:
        vm.coredump(tmp_path / "core")
        assert vm.state == "Running"
    return tmp_path / "core"


def tables() -> dict[int, bytes]:
    """Page tables of a kernel that maps the first 16 MiB at ``BASE``, and the note that leads there."""
    directory = [0] * 512
    for page in range(8):
        directory[8 + page] = page << 21 | PRESENT_WRITABLE | HUGE
    top, middle = [0] * 512, [0] * 512
    top[511], middle[510] = PDPT | PRESENT_WRITABLE, DIRECTORY | PRESENT_WRITABLE
    packed = {PML4: top, PDPT: middle, DIRECTORY: directory}
    found = {at: struct.pack("<512Q", *entries) for at, entries in packed.items()}
    return found | {VMCOREINFO_AT: note(b"VMCOREINFO", 0, VMCOREINFO)}


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
def test_gdb_sees_vcpus_and_memory(core: Path) -> None:
    asked = [
        "info threads",
        "thread 1",
        "info registers rip cs",
        f"x/s {TEXT_AT:#x}",
        f"x/2xb {tiny.BASE:#x}",
    ]
    words = [word for each in asked for word in ("-ex", each)]
    told = subprocess.run(
        ["gdb", "-batch", "-nx", *words, "-core", str(core)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    text = told.stdout
    assert "LWP 1" in text and "LWP 2" in text, text + told.stderr  # noqa: PT018 - both or the whole text
    assert f"rip            {tiny.BASE:#x}" in text
    assert f'{TEXT_AT:#x}:\t"{TEXT.decode()}"' in text
    assert f"{tiny.BASE:#x}:\t0xeb\t0xfe" in text


def test_drgn_sees_the_kernel_and_its_memory(core: Path) -> None:
    drgn = pytest.importorskip("drgn")
    program = drgn.Program()
    program.set_core_dump(core)
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert program.platform.arch == drgn.Architecture.X86_64
    assert program.read(TEXT_AT, len(TEXT), physical=True) == TEXT
    assert program.read(BASE + TEXT_AT, len(TEXT)) == TEXT

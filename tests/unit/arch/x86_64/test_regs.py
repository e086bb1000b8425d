"""The state a vCPU starts with."""

import subprocess
from pathlib import Path
from struct import unpack

import pytest

from pileus.arch.x86_64 import layout, msr, regs
from pileus.memory import GuestMemory, Region


def test_a_segment_is_its_descriptor_taken_apart() -> None:
    code = regs.segment(regs.CODE64, regs.CODE_SELECTOR)
    assert code == {
        "base": 0, "limit": 0xFFFFFFFF, "selector": 8, "type": 0xB, "s": 1, "dpl": 0, "present": 1,
        "avl": 0, "l": 1, "db": 0, "g": 1, "unusable": 0,
    }  # fmt: skip


def test_a_segment_without_granularity_counts_bytes() -> None:
    assert regs.segment(0x12008B345678_0067, 0x18)["limit"] == 0x67
    assert regs.segment(0x1200_8B34_5678_0067, 0x18)["base"] == 0x12345678


def test_the_fpu_structure_has_the_kernels_size(tmp_path: Path) -> None:
    source = tmp_path / "size.c"
    source.write_text(
        "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        'int main(void) { printf("%zu %zu %zu", sizeof(struct kvm_fpu), offsetof(struct kvm_fpu, fcw),'
        " offsetof(struct kvm_fpu, mxcsr)); }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "size", source], check=True)
    told = subprocess.run([tmp_path / "size"], check=True, capture_output=True, text=True).stdout
    packed = regs.FPU.pack(0x1234, 0, 0, 0, 0, 0, 0x89ABCDEF)
    expected = (len(packed), packed.index(b"\x34\x12"), packed.index(b"\xef\xcd\xab\x89"))
    assert tuple(map(int, told.split())) == expected


@pytest.mark.parametrize("pvh", [False, True])
def test_the_boot_page_tables_map_the_first_gib_to_itself(pvh: bool) -> None:
    with GuestMemory([(0, Region(-1, 1 << 20))]) as memory:
        regs.write_boot_tables(memory, pvh)
        for gpa in (0, 0x1FFFFF, 0x200000, layout.IDENTITY_MAPPED - 1):
            assert translate(memory, gpa) == gpa


def translate(memory: GuestMemory, address: int) -> int:
    """Walk the tables as a CPU with CR3 = PML4 does."""

    def entry(table: int, index: int) -> int:
        (value,) = unpack("<Q", memory.read(table + 8 * index, 8))
        assert value & 1, "present"
        return int(value)

    pdpt = entry(layout.PML4, address >> 39 & 511) & ~0xFFF
    directory = entry(pdpt, address >> 30 & 511) & ~0xFFF
    page = entry(directory, address >> 21 & 511)
    assert page >> 7 & 1, "2 MiB"
    return page & ~0x1FFFFF | address & 0x1FFFFF


def test_memory_is_write_back_from_the_start() -> None:
    assert msr.boot_msrs()[0x2FF] == 0x806

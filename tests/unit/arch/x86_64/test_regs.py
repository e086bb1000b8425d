"""The state a vCPU starts with."""

import subprocess
from pathlib import Path
from struct import pack, unpack
from typing import Any

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


class FakeVcpu:
    """Keeps what is set; its local APIC starts masked, as after a reset."""

    def __init__(self) -> None:
        self.sregs: dict[str, Any] = {"apic_base": 0xFEE00900}
        self.regs: dict[str, int] = {}
        self.parts = {"lapic": pack("<I", 0x10000) * 256}

    def get_part(self, name: str) -> bytes:
        return self.parts[name]

    def set_part(self, name: str, blob: bytes) -> None:
        self.parts[name] = blob


@pytest.fixture
def vcpu() -> Any:
    return FakeVcpu()


def test_pvh_starts_in_32_bit_mode_without_paging(vcpu: Any) -> None:
    regs.enter(vcpu, True, 0x100000, rsi=0, rbx=0x6000)
    assert vcpu.regs == {"rip": 0x100000, "rsi": 0, "rbx": 0x6000, "rflags": 2}
    assert vcpu.sregs["cr0"] == 0x11
    assert "cr3" not in vcpu.sregs
    code, task = vcpu.sregs["cs"], vcpu.sregs["tr"]
    assert (code["l"], code["db"], code["limit"]) == (0, 1, 0xFFFFFFFF)
    assert (task["base"], task["limit"], task["type"]) == (0, 0x67, 0xB)


def test_the_64_bit_protocol_starts_with_paging_and_a_stack(vcpu: Any) -> None:
    regs.enter(vcpu, False, 0x100200, rsi=0x7000, rbx=0)
    stack = layout.BOOT_STACK_TOP
    assert vcpu.regs == {
        "rip": 0x100200, "rsi": 0x7000, "rbx": 0, "rflags": 2, "rsp": stack, "rbp": stack
    }  # fmt: skip
    control = {name: vcpu.sregs[name] for name in ("cr0", "cr3", "cr4", "efer")}
    assert control == {"cr0": 0x80000011, "cr3": layout.PML4, "cr4": 0x20, "efer": 0x500}
    assert (vcpu.sregs["cs"]["l"], vcpu.sregs["cs"]["db"]) == (1, 0)


@pytest.mark.parametrize("pvh", [False, True])
def test_what_the_segments_hold_is_what_the_gdt_says(vcpu: Any, pvh: bool) -> None:
    regs.enter(vcpu, pvh, 0x100000, rsi=0, rbx=0)
    gdt, idt = vcpu.sregs["gdt"], vcpu.sregs["idt"]
    with GuestMemory([(0, Region(-1, 1 << 20))]) as memory:
        regs.write_boot_tables(memory, pvh)
        table = unpack("<4Q", memory.read(gdt["base"], gdt["limit"] + 1))
        assert not any(memory.read(idt["base"], idt["limit"] + 1))
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        held = vcpu.sregs[name]
        assert held == regs.segment(table[held["selector"] >> 3], held["selector"]), name


def test_only_the_null_descriptor_is_unusable() -> None:
    assert regs.segment(0, 0)["unusable"] == 1
    assert regs.segment(1 << 52, 8)["avl"] == 1


def test_a_reset_fpu_masks_every_exception(vcpu: Any) -> None:
    regs.reset_fpu(vcpu)
    values = regs.FPU.unpack(vcpu.parts["fpu"])
    assert (values[0], values[-1]) == (0x37F, 0x1F80)


def test_lint0_is_extint_and_lint1_is_nmi(vcpu: Any) -> None:
    regs.wire_local_interrupts(vcpu)
    lvt = unpack("<256I", vcpu.parts["lapic"])
    assert (lvt[0x350 // 4], lvt[0x360 // 4]) == (0x700, 0x400)
    assert set(lvt[: 0x350 // 4]) == {0x10000}, "nothing else moves"


def test_x2apic_mode_is_one_bit_more(vcpu: Any) -> None:
    regs.enable_x2apic(vcpu)
    assert vcpu.sregs["apic_base"] == 0xFEE00D00

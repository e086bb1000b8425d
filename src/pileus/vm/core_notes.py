"""The notes of a core: what each vCPU's registers hold, as debuggers look for it.

``CORE`` notes are those of a process's core, a thread per vCPU, which any debugger reads. ``QEMU`` notes hold
what a kernel's debugger needs beside: control registers, descriptor tables and hidden parts of segments.

Source: Linux, include/uapi/linux/elfcore.h (struct elf_prstatus) and arch/x86/include/asm/user_64.h; QEMU,
target/i386/arch_dump.c (QEMUCPUState, version 1); gABI, "Note Section".
"""

from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pileus.kvm import Vcpu

NT_PRSTATUS = 1
HEADER = Struct("<III")  # sizes of name and descriptor, type
PRSTATUS = Struct("<32xI76x27Q8x")  # the thread's id, then its registers
SEGMENT = Struct("<IIIIQ")  # selector, limit, flags, padding, base
STATE_HEAD = Struct("<II18Q")  # version, size, registers
STATE_TAIL = Struct("<6Q")  # CR0 to CR4, KERNEL_GS_BASE
STATE_SIZE = STATE_HEAD.size + 10 * SEGMENT.size + STATE_TAIL.size
STATE_VERSION = 1
MSR_KERNEL_GS_BASE = 0xC0000102

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
FLAGS = {"type": 8, "s": 12, "dpl": 13, "present": 15, "avl": 20, "l": 21, "db": 22, "g": 23}  # bit of each
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")


class Registers:
    """Those of one vCPU, which is out of the guest."""

    __slots__ = ("kernel_gs_base", "regs", "sregs")

    def __init__(self, regs: dict[str, int], sregs: "dict[str, Any]", kernel_gs_base: int) -> None:
        self.regs = regs
        self.sregs = sregs
        self.kernel_gs_base = kernel_gs_base


def registers(vcpu: "Vcpu") -> Registers:
    found = vcpu.get_msrs([MSR_KERNEL_GS_BASE])
    return Registers(vcpu.regs, vcpu.sregs, found.get(MSR_KERNEL_GS_BASE, 0))


def notes(vcpus: list[Registers]) -> bytes:
    """All notes of ``vcpus``, in their order."""
    plain = [note(b"CORE", NT_PRSTATUS, _prstatus(index, each)) for index, each in enumerate(vcpus)]
    return b"".join(plain + [note(b"QEMU", 0, _state(each)) for each in vcpus])


def note(name: bytes, kind: int, content: bytes) -> bytes:
    """A note; name and content begin at multiples of 4 bytes."""
    name += b"\0"
    return HEADER.pack(len(name), len(content), kind) + _padded(name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _prstatus(index: int, vcpu: Registers) -> bytes:
    regs, sregs = vcpu.regs, vcpu.sregs
    general = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx")
    return PRSTATUS.pack(
        index + 1,  # 0 would be no thread
        *(regs[name] for name in (*general, "rsi", "rdi")),
        regs["rax"],  # as if it were a system call's
        regs["rip"],
        sregs["cs"]["selector"],
        regs["rflags"],
        regs["rsp"],
        sregs["ss"]["selector"],
        sregs["fs"]["base"],
        sregs["gs"]["base"],
        *(sregs[name]["selector"] for name in ("ds", "es", "fs", "gs")),
    )


def _state(vcpu: Registers) -> bytes:
    sregs = vcpu.sregs
    parts = [STATE_HEAD.pack(STATE_VERSION, STATE_SIZE, *(vcpu.regs[name] for name in GENERAL))]
    parts += [_segment(sregs[name]) for name in SEGMENTS]
    parts += [SEGMENT.pack(0, sregs[name]["limit"], 0, 0, sregs[name]["base"]) for name in ("gdt", "idt")]
    parts.append(
        STATE_TAIL.pack(sregs["cr0"], 0, sregs["cr2"], sregs["cr3"], sregs["cr4"], vcpu.kernel_gs_base)
    )
    return b"".join(parts)


def _segment(segment: dict[str, int]) -> bytes:
    """The flags are those of a descriptor's upper half. Source: Intel SDM Vol. 3A, 3.4.5."""
    bits = (
        ("type", 8),
        ("s", 12),
        ("dpl", 13),
        ("present", 15),
        ("avl", 20),
        ("l", 21),
        ("db", 22),
        ("g", 23),
    )
    flags = sum(segment[name] << shift for name, shift in bits)
    return SEGMENT.pack(segment["selector"], segment["limit"], flags, 0, segment["base"])

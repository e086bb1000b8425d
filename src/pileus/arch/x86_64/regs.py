"""Registers of the boot vCPU as the boot protocols want them, and what lies in memory for that.

Source: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; Xen's docs/misc/pvh.pandoc.
"""

from struct import Struct, pack, unpack_from

from pileus.arch.x86_64.layout import BOOT_STACK_TOP, GDT, IDT, PAGE_DIRECTORY, PDPT, PML4

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.kvm import Vcpu
    from pileus.memory import GuestMemory

NULL = 0
CODE64 = 0x00AF9B000000FFFF
CODE32 = 0x00CF9B000000FFFF
DATA = 0x00CF93000000FFFF
TSS = 0x008F8B000000FFFF
TSS32 = 0x00008B0000000067  # PVH asks for a base of 0 and a limit of 0x67
CODE_SELECTOR, DATA_SELECTOR, TSS_SELECTOR = 0x8, 0x10, 0x18

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_RESERVED = 1 << 1
PAGE_PRESENT_WRITABLE = 0b11
PAGE_HUGE = 1 << 7

FPU = Struct("<128x2HBxH2Q256xI4x")  # struct kvm_fpu: registers, then control words
FPU_CONTROL_WORD, MXCSR_DEFAULT = 0x37F, 0x1F80
APIC_LVT_LINT0, APIC_LVT_LINT1 = 0x350, 0x360
DELIVERY_EXTINT, DELIVERY_NMI = 7 << 8, 4 << 8
DELIVERY_MASK = 7 << 8
LVT_MASKED = 1 << 16
APIC_BASE_X2APIC = 1 << 10


def segment(descriptor: int, selector: int) -> dict[str, int]:
    """The hidden part of a segment register, from its GDT entry. Source: Intel SDM Vol. 3A, 3.4.5."""
    granular = descriptor >> 55 & 1
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    return {
        "base": descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000,
        "limit": limit << 12 | 0xFFF if granular else limit,
        "selector": selector,
        "type": descriptor >> 40 & 0xF,
        "s": descriptor >> 44 & 1,
        "dpl": descriptor >> 45 & 3,
        "present": descriptor >> 47 & 1,
        "avl": descriptor >> 52 & 1,
        "l": descriptor >> 53 & 1,
        "db": descriptor >> 54 & 1,
        "g": granular,
        "unusable": int(descriptor == NULL),
    }


def write_boot_tables(memory: "GuestMemory", pvh: bool) -> None:
    """GDT, IDT, and page tables that map the first GiB to itself in 2 MiB pages."""
    gdt = (NULL, CODE32, DATA, TSS32) if pvh else (NULL, CODE64, DATA, TSS)
    memory.write(GDT, pack("<4Q", *gdt))
    memory.write(IDT, bytes(8))
    memory.write(PML4, pack("<Q", PDPT | PAGE_PRESENT_WRITABLE))
    memory.write(PDPT, pack("<Q", PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE))
    entries = [page << 21 | PAGE_PRESENT_WRITABLE | PAGE_HUGE for page in range(512)]
    memory.write(PAGE_DIRECTORY, pack("<512Q", *entries))


def enter(vcpu: "Vcpu", pvh: bool, rip: int, *, rsi: int, rbx: int) -> None:
    """Let the boot vCPU start at ``rip``: in 32-bit protected mode for PVH, else in 64-bit mode."""
    sregs = vcpu.sregs
    sregs["cs"] = segment(CODE32 if pvh else CODE64, CODE_SELECTOR)
    for name in ("ds", "es", "fs", "gs", "ss"):
        sregs[name] = segment(DATA, DATA_SELECTOR)
    sregs["tr"] = segment(TSS32 if pvh else TSS, TSS_SELECTOR)
    sregs["gdt"] = {"base": GDT, "limit": 31}
    sregs["idt"] = {"base": IDT, "limit": 7}
    if pvh:
        sregs["cr0"] = CR0_PE | CR0_ET
    else:
        sregs |= {"cr0": CR0_PE | CR0_ET | CR0_PG, "cr3": PML4, "cr4": CR4_PAE, "efer": EFER_LME | EFER_LMA}
    vcpu.sregs = sregs
    stack = {} if pvh else {"rsp": BOOT_STACK_TOP, "rbp": BOOT_STACK_TOP}
    vcpu.regs = {"rip": rip, "rsi": rsi, "rbx": rbx, "rflags": RFLAGS_RESERVED, **stack}


def reset_fpu(vcpu: "Vcpu") -> None:
    """What FNINIT and a reset leave: all exceptions masked."""
    vcpu.set_part("fpu", FPU.pack(FPU_CONTROL_WORD, 0, 0, 0, 0, 0, MXCSR_DEFAULT))


def enable_x2apic(vcpu: "Vcpu") -> None:
    """Hand the local APIC over in x2APIC mode: Linux takes APIC ids above 254 only from firmware that did."""
    sregs = vcpu.sregs
    sregs["apic_base"] |= APIC_BASE_X2APIC
    vcpu.sregs = sregs


def wire_local_interrupts(vcpu: "Vcpu") -> None:
    """LINT0 takes interrupts of the legacy controllers, LINT1 is NMI, as firmware leaves them."""
    apic = bytearray(vcpu.get_part("lapic"))
    for offset, delivery in ((APIC_LVT_LINT0, DELIVERY_EXTINT), (APIC_LVT_LINT1, DELIVERY_NMI)):
        (lvt,) = unpack_from("<I", apic, offset)
        apic[offset : offset + 4] = pack("<I", lvt & ~(DELIVERY_MASK | LVT_MASKED) | delivery)
    vcpu.set_part("lapic", bytes(apic))

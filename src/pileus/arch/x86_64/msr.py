"""The MSRs a vCPU starts with, and their numbers. Source: Intel SDM Vol. 4; <asm/msr-index.h>."""

TSC = 0x10
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
MISC_ENABLE = 0x1A0
MISC_ENABLE_FAST_STRINGS = 1 << 0
MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLED, WRITE_BACK = 1 << 11, 6
STAR, LSTAR, CSTAR, SYSCALL_MASK = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
KERNEL_GS_BASE = 0xC0000102


def boot_msrs() -> dict[int, int]:
    """What every vCPU starts with: system calls off, memory write-back, the TSC at 0."""
    zero = (
        SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, STAR, LSTAR, CSTAR, SYSCALL_MASK, KERNEL_GS_BASE, TSC
    )  # fmt: skip
    return dict.fromkeys(zero, 0) | {
        MISC_ENABLE: MISC_ENABLE_FAST_STRINGS,
        MTRR_DEF_TYPE: MTRR_ENABLED | WRITE_BACK,
    }

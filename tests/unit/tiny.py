"""Kernels of a few bytes: enough to see a whole VM run on any /dev/kvm, also one that interprets kernels."""

import struct

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
# inc byte [COUNTER]; cmp byte [COUNTER], 3; je +N: the third boot skips the N bytes that follow
COUNT_TO_3 = bytes.fromhex("fe0500002000 803d0000200003 74")


def elf(code: bytes, *, pvh: bool = True) -> bytes:
    """An ELF64 kernel of ``code``, entered by PVH or, without the note, in 64-bit mode."""
    note = struct.pack("<III4sI", 4, 4, XEN_PHYS32_ENTRY, b"Xen\0", BASE)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, BASE, 64, 0, 0, 64, 56, 2 if pvh else 1, 0, 0, 0
    )
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, BASE, BASE, len(code), len(code), 0x1000)
    segments += struct.pack("<IIQQQQQQ", 4, 4, 0x800, 0, 0, len(note), len(note), 4)
    return ((header + segments).ljust(0x800, b"\0") + note).ljust(0x1000, b"\0") + code


def third_boot_powers_off(otherwise: bytes) -> bytes:
    """Say A; do ``otherwise`` on the first two boots of one RAM, then power off."""
    return SAY_A + COUNT_TO_3 + bytes([len(otherwise)]) + otherwise + POWER_OFF

"""A kernel of a few bytes, for benchmarks of the start on any KVM."""

import struct


def tiny_kernel(mark: bytes) -> bytes:
    """Return an ELF file with a PVH entry that writes ``mark``, a byte, to the serial port and halts.

    Source: Xen, docs/misc/pvh.pandoc: 32-bit protected mode, paging off; note 18 holds the entry's address.
    """
    base = 0x100000
    code = b"\xb0" + mark + b"\x66\xba\xf8\x03\xee\xf4\xeb\xfd"  # mov al; mov dx, 0x3f8; out; hlt; jmp hlt
    headers = 64 + 2 * 56
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", base + headers)
    image = code.ljust(16, b"\xf4") + note
    ident = b"\x7fELF\x02\x01\x01"
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    size = headers + len(image)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    start = headers + 16
    notes = struct.pack("<IIQQQQQQ", 4, 4, start, base + start, base + start, len(note), len(note), 4)
    return elf + load + notes + image

"""Takes a stock bzImage apart: the ELF kernel inside it, with or without its PVH entry."""

import lzma
import struct
import subprocess
import zlib

from support.host import ScriptError

PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18


def vmlinux(image: bytes) -> bytes:
    """Return the ELF file that ``image``, a bzImage, decompresses when it boots.

    Source: Linux, Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    """
    if image[0x202:0x206] != b"HdrS":
        raise ScriptError("not a bzImage: no HdrS at 0x202")
    setup_size = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    # The build appends the size of the unpacked kernel as four bytes, which no format knows.
    payload = image[setup_size + offset : setup_size + offset + length - 4]
    elf = _unpack(payload)
    if elf[:4] != b"\x7fELF":
        raise ScriptError("the payload of the bzImage is not an ELF file")
    return elf


def _unpack(payload: bytes) -> bytes:
    if payload[:2] == b"\x1f\x8b":
        return zlib.decompressobj(wbits=31).decompress(payload)
    if payload[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor().decompress(payload)
    for magic, command in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if payload[:4] == magic:
            return subprocess.run([command, "-dcq"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    raise ScriptError(f"the payload of the bzImage starts with {payload[:6].hex()}, no known compression")


def without_pvh(elf: bytes) -> bytes:
    """Return ``elf`` with its PVH note renamed, so that a VMM takes the 64-bit entry instead."""
    patched = bytearray(elf)
    for offset, name, kind in _notes(elf):
        if name == b"Xen\0" and kind == XEN_ELFNOTE_PHYS32_ENTRY:
            struct.pack_into("<I", patched, offset + 8, 0xFFFF)
    if patched == elf:
        raise ScriptError("the kernel has no PVH note to disable")
    return bytes(patched)


def _notes(elf: bytes) -> list[tuple[int, bytes, int]]:
    """Return (file offset, name, type) of each ELF note."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    entry_size, count = struct.unpack_from("<HH", elf, 54)
    found = []
    for index in range(count):
        kind, _, start = struct.unpack_from("<IIQ", elf, table + index * entry_size)
        (size,) = struct.unpack_from("<Q", elf, table + index * entry_size + 32)
        offset = start
        while kind == PT_NOTE and offset < start + size:
            name_size, data_size, note = struct.unpack_from("<III", elf, offset)
            found.append((offset, elf[offset + 12 : offset + 12 + name_size], note))
            offset += 12 + (name_size + 3 & ~3) + (data_size + 3 & ~3)
    return found

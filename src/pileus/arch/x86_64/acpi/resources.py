"""Resource descriptors: what ``_CRS`` says a device uses. Each function returns one descriptor's bytes.

Source: ACPI 6.3, 6.4 (Resource Data Types for ACPI).
"""

from struct import pack

from pileus.arch.x86_64.acpi.aml import buffer

END_TAG = b"\x79\x00"  # no checksum
EDGE, LEVEL = 1 << 1, 0 << 1  # of interrupt()
ACTIVE_LOW = 1 << 2
SHARED = 1 << 3
_MEMORY, _IO, _BUS = 0, 1, 2
_CONSUMER = 1 << 0
_FIXED = 3 << 2  # both ends
_READ_WRITE, _CACHEABLE = 1 << 0, 1 << 1
_ENTIRE_RANGE = 3


def resource_template(*descriptors: bytes) -> bytes:
    return buffer(b"".join(descriptors) + END_TAG)


def io(base: int, length: int, alignment: int = 1) -> bytes:
    """Ports at ``base``, decoded with 16 bits."""
    return pack("<BBHHBB", 0x47, 1, base, base, alignment, length)


def memory32_fixed(base: int, length: int, *, writable: bool = True) -> bytes:
    return pack("<BHBII", 0x86, 9, writable, base, length)


def interrupt(gsi: int, flags: int = EDGE) -> bytes:
    """An extended interrupt that the device consumes: EDGE or LEVEL, with ACTIVE_LOW and SHARED if so."""
    return pack("<BHBBI", 0x89, 6, _CONSUMER | flags, 1, gsi)


# Windows that a bus hands on to its children: both ends (inclusive) fixed, nothing translated.


def bus_numbers(first: int, last: int) -> bytes:
    return pack("<BHBBBHHHHH", 0x88, 13, _BUS, _FIXED, 0, 0, first, last, 0, last - first + 1)


def io_window(first: int, last: int) -> bytes:
    return pack("<BHBBBHHHHH", 0x88, 13, _IO, _FIXED, _ENTIRE_RANGE, 0, first, last, 0, last - first + 1)


def memory_window32(first: int, last: int, *, cacheable: bool = False) -> bytes:
    flags = _READ_WRITE | cacheable * _CACHEABLE
    return pack("<BHBBBIIIII", 0x87, 23, _MEMORY, _FIXED, flags, 0, first, last, 0, last - first + 1)


def memory_window64(first: int, last: int, *, cacheable: bool = False) -> bytes:
    flags = _READ_WRITE | cacheable * _CACHEABLE
    return pack("<BHBBBQQQQQ", 0x8A, 43, _MEMORY, _FIXED, flags, 0, first, last, 0, last - first + 1)

"""Every construct against what iasl compiles from the same construct in ASL."""

import random
from typing import Any

import pytest

from pileus.arch.x86_64.acpi import aml
from pileus.arch.x86_64.acpi.aml import ARG0, ARG1, LOCAL0, LOCAL1, path
from pileus.arch.x86_64.acpi.resources import (
    ACTIVE_LOW,
    EDGE,
    LEVEL,
    SHARED,
    bus_numbers,
    interrupt,
    io,
    io_window,
    memory32_fixed,
    memory_window32,
    memory_window64,
    resource_template,
)


def body(*terms: bytes) -> bytes:
    """A method with two arguments around statements."""
    return aml.method("TEST", *terms, args=2)


def crs(*descriptors: bytes) -> bytes:
    return aml.name("_CRS", resource_template(*descriptors))


CONSTRUCTS = {  # ASL of statements and descriptors stands in a method or template: see ``wrapped``
    "Name of an integer": ("Name (ABCD, 0x12345678)", aml.name("ABCD", 0x12345678)),
    "Name of a string": ('Name (ABCD, "text")', aml.name("ABCD", "text")),
    "short name": ("Name (A, 7)", aml.name("A", 7)),
    "root name": ("Name (\\A, 7)", aml.name("\\A", 7)),
    "EISA id": ('Name (_HID, EisaId ("PNP0C0C"))', aml.name("_HID", aml.eisa_id("PNP0C0C"))),
    "Scope": (
        "Scope (\\_SB) { Name (ABCD, 0) }",
        aml.scope("\\_SB", aml.name("ABCD", 0)),
    ),
    "Device in Device": (
        "Device (\\_SB.DEV0) { Device (DEV1) { Name (_UID, 1) } } Name (\\_SB.DEV0.DEV1.ABCD, 2)"
        " Scope (\\_SB.DEV0) { Name (^XYZ, 3) }",
        aml.device("\\_SB.DEV0", aml.device("DEV1", aml.name("_UID", 1)))
        + aml.name("\\_SB.DEV0.DEV1.ABCD", 2)
        + aml.scope("\\_SB.DEV0", aml.name("^XYZ", 3)),
    ),
    "Method": (
        "Method (ABCD, 3, Serialized) { Return (Arg0) }",
        aml.method("ABCD", aml.return_(ARG0), args=3, serialized=True),
    ),
    "empty Method": ("Method (ABCD) {}", aml.method("ABCD")),
    "Package": (
        'Name (ABCD, Package () { 0, 1, 0xFF, "text", Package () { 0x1234 } })',
        aml.name("ABCD", aml.package(0, 1, 0xFF, "text", aml.package(0x1234))),
    ),
    "Buffer": ("Name (ABCD, Buffer () { 1, 2, 3 })", aml.name("ABCD", aml.buffer(b"\1\2\3"))),
    "Mutex": (
        "Mutex (LCK, 0) Method (ABCD) { Acquire (LCK, 0xFFFF) Release (LCK) }",
        aml.mutex("LCK") + aml.method("ABCD", aml.acquire("LCK"), aml.release("LCK")),
    ),
    "OperationRegion and Field": (
        "OperationRegion (PRST, SystemIO, 0xAF00, 0x10)"
        " Field (PRST, ByteAcc, NoLock, WriteAsZeros)"
        " { Offset (4), CPEN, 1, CINS, 1, , 6, CCMD, 8, LONG, 64 }"
        " Field (PRST, DWordAcc, Lock, Preserve) { CSEL, 32 }",
        aml.operation_region("PRST", aml.SYSTEM_IO, 0xAF00, 0x10)
        + aml.field(
            "PRST",
            aml.BYTE_ACCESS | aml.WRITE_AS_ZEROS,
            *(("", 32), ("CPEN", 1), ("CINS", 1), ("", 6), ("CCMD", 8), ("LONG", 64)),
        )
        + aml.field("PRST", aml.DWORD_ACCESS | aml.LOCK | aml.PRESERVE, ("CSEL", 32)),
    ),
    "memory OperationRegion": (
        "OperationRegion (BIG, SystemMemory, 0x123456789A, 0x1000)"
        " Field (BIG, AnyAcc, NoLock, WriteAsOnes) { FLD, 32760 }",
        aml.operation_region("BIG", aml.SYSTEM_MEMORY, 0x123456789A, 0x1000)
        + aml.field("BIG", aml.ANY_ACCESS | aml.WRITE_AS_ONES, ("FLD", 32760)),
    ),
    "Notify": (
        "Device (DEV0) { Name (_HID, \"ABCD0001\") } Method (ABCD) { Notify (DEV0, 0x80) }",
        aml.device("DEV0", aml.name("_HID", "ABCD0001"))
        + aml.method("ABCD", aml.notify(path("DEV0"), 0x80)),
    ),
    "call": (
        "Method (CALL, 2) { Return (Arg1) } Method (ABCD) { Return (CALL (5, \"text\")) }",
        aml.method("CALL", aml.return_(ARG1), args=2)
        + aml.method("ABCD", aml.return_(aml.call("CALL", 5, "text"))),
    ),
}  # fmt: skip
STATEMENTS = {
    "Store": ("Store (0x55, Local0) Store (Local0, Arg1)", aml.store(0x55, LOCAL0) + aml.store(LOCAL0, ARG1)),
    "If and Else": (
        "If (LEqual (Arg0, 1)) { Store (2, Local0) } Else { Store (3, Local1) }",
        aml.if_(aml.equal(ARG0, 1), aml.store(2, LOCAL0)) + aml.else_(aml.store(3, LOCAL1)),
    ),
    "While": (
        "Store (0, Local0) While (LLess (Local0, 10)) { Increment (Local0) }",
        aml.store(0, LOCAL0) + aml.while_(aml.less(LOCAL0, 10), aml.increment(LOCAL0)),
    ),
    "Add": ("Add (Arg0, 7, Local0)", aml.add(ARG0, 7, LOCAL0)),
    "Subtract": ("Subtract (Arg0, 7, Local0)", aml.subtract(ARG0, 7, LOCAL0)),
    "And": ("And (Arg0, 7, Local0)", aml.and_(ARG0, 7, LOCAL0)),
    "Or": ("Or (Arg0, 7, Local0)", aml.or_(ARG0, 7, LOCAL0)),
    "ShiftLeft": ("ShiftLeft (Arg0, 7, Local0)", aml.shift_left(ARG0, 7, LOCAL0)),
    "ShiftRight": ("ShiftRight (Arg0, 7, Local0)", aml.shift_right(ARG0, 7, LOCAL0)),
    "a result used as a value": (
        "Store (And (Add (Arg0, 7), Arg1), Local0)",
        aml.store(aml.and_(aml.add(ARG0, 7), ARG1), LOCAL0),
    ),
    "LGreater and LNot": (
        "If (LNot (LGreater (Arg0, 1))) { Store (2, Local0) }",
        aml.if_(aml.not_(aml.greater(ARG0, 1)), aml.store(2, LOCAL0)),
    ),
}
DESCRIPTORS = {
    "IO": ("IO (Decode16, 0x3F8, 0x3F8, 1, 8)", io(0x3F8, 8)),
    "Memory32Fixed": ("Memory32Fixed (ReadWrite, 0xD0000000, 0x1000)", memory32_fixed(0xD0000000, 0x1000)),
    "Memory32Fixed, read only": (
        "Memory32Fixed (ReadOnly, 0xD0000000, 0x1000)",
        memory32_fixed(0xD0000000, 0x1000, writable=False),
    ),
    "edge interrupt": ("Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 4 }", interrupt(4)),
    "level interrupt": (
        "Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 23 }",
        interrupt(23, LEVEL | ACTIVE_LOW | SHARED),
    ),
    "shared edge interrupt": (
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared) { 5 }",
        interrupt(5, EDGE | SHARED),
    ),
    "WordBusNumber": (
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0, 0, 255, 0, 256)",
        bus_numbers(0, 255),
    ),
    "WordIO": (
        "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0, 0xD00, 0xFFFF, 0, 0xF300)",
        io_window(0xD00, 0xFFFF),
    ),
    "DWordMemory": (
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
        " 0, 0xC0000000, 0xE7FFFFFF, 0, 0x28000000)",
        memory_window32(0xC0000000, 0xE7FFFFFF),
    ),
    "QWordMemory": (
        "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,"
        " 0, 0x100000000, 0x7FFFFFFFFF, 0, 0x7F00000000)",
        memory_window64(0x100000000, 0x7FFFFFFFFF, cacheable=True),
    ),
    "several": (
        "IO (Decode16, 0x70, 0x70, 1, 2) Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 8 }",
        io(0x70, 2) + interrupt(8),
    ),
}


def wrapped() -> dict[str, tuple[str, bytes]]:
    cases = dict(CONSTRUCTS)
    for each, (asl, encoded) in STATEMENTS.items():
        cases[each] = (f"Method (TEST, 2) {{ {asl} }}", body(encoded))
    for each, (asl, encoded) in DESCRIPTORS.items():
        cases[each] = (f"Name (_CRS, ResourceTemplate () {{ {asl} }})", crs(encoded))
    return cases


@pytest.mark.parametrize(("asl", "encoded"), wrapped().values(), ids=wrapped())
def test_encodes_as_iasl_does(iasl: Any, asl: str, encoded: bytes) -> None:
    assert encoded == iasl.compile(asl)


def test_integers_have_their_shortest_form(iasl: Any) -> None:
    values = [0, 1, 2, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFE]
    for bits in (8, 16, 32, 63):
        values += [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]
    values += [random.Random(1).getrandbits(bits) for bits in range(1, 65) for _ in range(3)]
    source = "\n".join(f"Name (\\I{index:03X}, {value:#x})" for index, value in enumerate(values))
    encoded = b"".join(aml.name(f"\\I{index:03X}", value) for index, value in enumerate(values))
    assert encoded == iasl.compile(source)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_other_integers_have_none(value: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        aml.integer(value)


BOUNDARIES = [0x3F, 0x1000, 0x10_0000]  # of 1-, 2- and 3-byte package lengths


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=hex)
def test_package_lengths_are_right_around_their_boundaries(iasl: Any, boundary: int) -> None:
    source, encoded = [], b""
    for index, size in enumerate(range(boundary - 12, boundary + 3)):
        strings = ["a" * min(8000, size - at) for at in range(0, size, 8002)]  # 2 bytes more each
        elements = ", ".join(f'"{each}"' for each in strings)
        source.append(f"Name (P{index:03}, Package () {{ {elements} }})")
        encoded += aml.name(f"P{index:03}", aml.package(*strings))
    assert encoded == iasl.compile("\n".join(source))


def decode_length(data: bytes) -> tuple[int, int]:
    """The value of a package length, and its bytes."""
    count = data[0] >> 6
    if not count:
        return data[0] & 0x3F, 1
    return data[0] & 0xF | int.from_bytes(data[1 : count + 1], "little") << 4, count + 1


@pytest.mark.parametrize("limit", [1 << 6, 1 << 12, 1 << 20, 1 << 28], ids=hex)
def test_a_package_length_counts_itself(limit: int) -> None:
    for size in {*range(20), *range(limit - 20, limit - 4)}:
        encoded = aml.package_length(size)
        assert decode_length(encoded) == (size + len(encoded), len(encoded))


def test_a_package_length_uses_no_more_bytes_than_it_needs() -> None:
    assert [len(aml.package_length(size)) for size in (62, 63, 4093, 4094, 1048572, 1048573)] == [
        1,
        2,
        2,
        3,
        3,
        4,
    ]


def test_a_package_has_less_than_256_mib() -> None:
    assert len(aml.package_length((1 << 28) - 5)) == 4
    with pytest.raises(ValueError, match="too long"):
        aml.package_length((1 << 28) - 4)


@pytest.mark.parametrize("bad", ["ABCDE", "A..B", "_SB.TOOLONG"])
def test_a_name_segment_has_one_to_four_characters(bad: str) -> None:
    with pytest.raises(ValueError, match="no name segment"):
        path(bad)

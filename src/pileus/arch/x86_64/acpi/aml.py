"""An AML encoder: each function returns the bytes of one ASL construct of its name.

Values (``Value``) are what the construct's operands may be: an int is the shortest integer constant, a
str a string constant, bytes are AML that was encoded before: ``path(...)``, ``ARG0``, ``add(...)``, …::

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resource_template(io(0x3F8, 8))))

Source: ACPI 6.3, 20.2 (AML Grammar Definition); resource descriptors are in ``resources``.
"""

Value = int | str | bytes

ZERO, ONE, ONES = b"\x00", b"\x01", b"\xff"
ARG0, ARG1, ARG2, ARG3 = b"\x68", b"\x69", b"\x6a", b"\x6b"
LOCAL0, LOCAL1, LOCAL2, LOCAL3 = b"\x60", b"\x61", b"\x62", b"\x63"
NOWHERE = b"\x00"  # the target of a result that is only used as a value

SYSTEM_MEMORY, SYSTEM_IO = 0, 1  # spaces of an operation region
ANY_ACCESS, BYTE_ACCESS, WORD_ACCESS, DWORD_ACCESS, QWORD_ACCESS = range(5)
PRESERVE, WRITE_AS_ONES, WRITE_AS_ZEROS = 0 << 5, 1 << 5, 2 << 5  # update rules of a field
LOCK = 1 << 4

_INTEGERS = ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8))  # prefix, bytes
_MAX_IN_ONE_BYTE = 0x3F  # a longer package length spends two bits on its size


def integer(value: int) -> bytes:
    """The shortest form of ``value``, 0 to 2^64 - 1."""
    if value in (0, 1):
        return bytes([value])
    if value == 0xFFFF_FFFF_FFFF_FFFF:
        return ONES
    for prefix, size in _INTEGERS:
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """A string constant; ``text`` is ASCII without NUL."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def encode(value: Value) -> bytes:
    """An operand: a constant, or AML as it is."""
    if isinstance(value, bytes):
        return value
    return integer(value) if isinstance(value, int) else string(value)


def path(text: str) -> bytes:
    """A name as in ASL: ``_HID``, ``PCI0.S01``, ``\\_SB.CPUS``, ``^^PRES``; short segments are padded."""
    rest = text.lstrip("\\^")
    prefix = text[: len(text) - len(rest)].encode("ascii")
    segments = [_segment(each) for each in rest.split(".")] if rest else []
    if len(segments) > 2:
        prefix += bytes([0x2F, len(segments)])
    elif len(segments) == 2:
        prefix += b"\x2e"
    return prefix + (b"".join(segments) or b"\0")


def eisa_id(text: str) -> bytes:
    """A compressed id such as ``PNP0501``: three letters of 5 bits, four hexadecimal digits."""
    first, second, third = (ord(letter) - 0x40 for letter in text[:3])
    code = first << 26 | second << 21 | third << 16 | int(text[3:], 16)
    return b"\x0c" + code.to_bytes(4, "big")


def package_length(size: int) -> bytes:
    """The length in front of ``size`` bytes, which counts itself too."""
    if size + 1 <= _MAX_IN_ONE_BYTE:
        return bytes([size + 1])
    for count in (2, 3, 4):
        if size + count < 1 << (8 * count - 4):
            return _long_length(size + count, count)
    raise ValueError(f"a package of {size} bytes is too long")


# Objects with names.


def name(where: str, value: Value) -> bytes:
    return b"\x08" + path(where) + encode(value)


def scope(where: str, *terms: bytes) -> bytes:
    return b"\x10" + _packaged(path(where), *terms)


def device(where: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _packaged(path(where), *terms)


def method(where: str, *terms: bytes, args: int = 0, serialized: bool = False) -> bytes:
    return b"\x14" + _packaged(path(where), bytes([args | serialized << 3]), *terms)


def mutex(where: str, sync_level: int = 0) -> bytes:
    return b"\x5b\x01" + path(where) + bytes([sync_level])


def operation_region(where: str, space: int, offset: Value, size: Value) -> bytes:
    return b"\x5b\x80" + path(where) + bytes([space]) + encode(offset) + encode(size)


def field(region: str, flags: int, *units: tuple[str, int]) -> bytes:
    """Units are (name, bits), in order; an empty name skips bits. ``flags``: access | LOCK | update rule."""
    return b"\x5b\x81" + _packaged(path(region), bytes([flags]), *(_unit(*unit) for unit in units))


# Data.


def package(*elements: Value) -> bytes:
    return b"\x12" + _packaged(bytes([len(elements)]), *(encode(each) for each in elements))


def buffer(data: bytes) -> bytes:
    return b"\x11" + _packaged(integer(len(data)), data)


# Statements, for the body of a method. ``call`` has no opcode: the name alone calls.


def call(where: str, *args: Value) -> bytes:
    return path(where) + _joined(args)


def if_(condition: Value, *terms: bytes) -> bytes:
    return b"\xa0" + _packaged(encode(condition), *terms)


def else_(*terms: bytes) -> bytes:
    return b"\xa1" + _packaged(*terms)


def while_(condition: Value, *terms: bytes) -> bytes:
    return b"\xa2" + _packaged(encode(condition), *terms)


def store(value: Value, target: bytes) -> bytes:
    return b"\x70" + encode(value) + target


def notify(target: bytes, value: Value) -> bytes:
    return b"\x86" + target + encode(value)


def return_(value: Value) -> bytes:
    return b"\xa4" + encode(value)


def acquire(where: str, timeout_ms: int = 0xFFFF) -> bytes:
    return b"\x5b\x23" + path(where) + timeout_ms.to_bytes(2, "little")


def release(where: str) -> bytes:
    return b"\x5b\x27" + path(where)


def increment(target: bytes) -> bytes:
    return b"\x75" + target


# Expressions.


def add(left: Value, right: Value, target: bytes = NOWHERE) -> bytes:
    return b"\x72" + encode(left) + encode(right) + target


def subtract(left: Value, right: Value, target: bytes = NOWHERE) -> bytes:
    return b"\x74" + encode(left) + encode(right) + target


def shift_left(value: Value, count: Value, target: bytes = NOWHERE) -> bytes:
    return b"\x79" + encode(value) + encode(count) + target


def shift_right(value: Value, count: Value, target: bytes = NOWHERE) -> bytes:
    return b"\x7a" + encode(value) + encode(count) + target


def and_(left: Value, right: Value, target: bytes = NOWHERE) -> bytes:
    return b"\x7b" + encode(left) + encode(right) + target


def or_(left: Value, right: Value, target: bytes = NOWHERE) -> bytes:
    return b"\x7d" + encode(left) + encode(right) + target


def equal(left: Value, right: Value) -> bytes:
    return b"\x93" + encode(left) + encode(right)


def greater(left: Value, right: Value) -> bytes:
    return b"\x94" + encode(left) + encode(right)


def less(left: Value, right: Value) -> bytes:
    return b"\x95" + encode(left) + encode(right)


def not_(value: Value) -> bytes:
    """True for zero, as ASL's LNot."""
    return b"\x92" + encode(value)


def _segment(text: str) -> bytes:
    if not 1 <= len(text) <= 4:
        raise ValueError(f"{text!r} is no name segment: 1 to 4 characters are allowed")
    return text.ljust(4, "_").encode("ascii")


def _long_length(length: int, count: int) -> bytes:
    """``length`` in ``count`` bytes: its low four bits share the first with the number of the others."""
    return bytes([(count - 1) << 6 | length & 0xF]) + (length >> 4).to_bytes(count - 1, "little")


def _packaged(*parts: bytes) -> bytes:
    content = b"".join(parts)
    return package_length(len(content)) + content


def _joined(values: tuple[Value, ...]) -> bytes:
    return b"".join(map(encode, values))


def _unit(where: str, bits: int) -> bytes:
    """A field unit; its length counts bits, not itself."""
    if bits <= _MAX_IN_ONE_BYTE:
        length = bytes([bits])
    else:
        length = next(_long_length(bits, count) for count in (2, 3, 4) if bits < 1 << (8 * count - 4))
    return (_segment(where) if where else b"\0") + length

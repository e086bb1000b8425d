"""What a value can be: how it is read, how it is written, and how ``--help`` and errors describe it.

A kind is shared by all fields that take it, and holds no value. ``read`` raises ValueError, to which the
caller adds option, key and ``allowed``. In the API most kinds will look as in ``parse``'s result.
"""

import os

from pileus.config import units
from pileus.config.grammar import quote, split, unquote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pileus.config.declare import Struct

HEX = frozenset("0123456789abcdef")
FORBIDDEN_IN_NAMES = frozenset(b"\0/:% \t\n\v\f\r")


class Kind:
    """Any text; the others derive from it. ``metavar`` is the value's name in a line of help."""

    metavar = "TEXT"
    allowed = "any text"

    def read(self, raw: str) -> object:
        """The value written as ``raw``, the part of an option after ``key=``. Raises ValueError."""
        return self.parse(unquote(raw))

    def write(self, value: "Any") -> str:
        """What ``read`` turns into ``value``."""
        return quote(self.format(value))

    def parse(self, text: str) -> object:
        return text

    def format(self, value: "Any") -> str:
        return str(value)


class Size(Kind):
    """Bytes."""

    metavar = "SIZE"
    allowed = "a number of bytes below 2^64, in decimal, perhaps with K, M, G or T (powers of 1024)"

    def parse(self, text: str) -> int:
        return units.parse_size(text)

    def format(self, value: int) -> str:
        return units.format_size(value)


class Count(Kind):
    """A whole number within bounds, which belong to it."""

    metavar = "N"

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high
        self.allowed = f"a whole number from {low} to {high}"

    def parse(self, text: str) -> int:
        value = units.parse_count(text)
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is out of bounds")
        return value


class Switch(Kind):
    metavar = "on|off"
    allowed = "on or off"

    def parse(self, text: str) -> bool:
        return units.parse_switch(text)

    def format(self, value: bool) -> str:
        return units.format_switch(value)


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.metavar = "|".join(words)
        self.allowed = f"{', '.join(words[:-1])} or {words[-1]}"

    def parse(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(f"{text!r} is not among them")
        return text


class Path(Kind):
    metavar = "PATH"
    allowed = "a path, not an empty one"

    def parse(self, text: str) -> str:
        if not text or "\0" in text:
            raise ValueError("no path")
        return text


class Interface(Kind):
    """The name of a network interface."""

    metavar = "NAME"
    allowed = "an interface's name, 1 to 15 bytes without blanks, / : or %"

    def parse(self, text: str) -> str:
        raw = os.fsencode(text)
        if not 1 <= len(raw) <= 15 or text in (".", "..") or not FORBIDDEN_IN_NAMES.isdisjoint(raw):
            raise ValueError(f"{text!r} is no name of an interface")
        return text


class Mac(Kind):
    """A MAC address that one interface can have; in lower case."""

    metavar = "MAC"
    allowed = "six bytes in hexadecimal, xx:xx:xx:xx:xx:xx, no multicast address and not all zero"

    def parse(self, text: str) -> str:
        parts = text.strip().lower().split(":")
        if len(parts) != 6 or not all(len(part) == 2 and HEX.issuperset(part) for part in parts):
            raise ValueError(f"{text!r} is no MAC address")
        if int(parts[0], 16) & 1 or set(parts) == {"00"}:
            raise ValueError(f"{text!r} is not the address of one interface")
        return ":".join(parts)


class Address(Kind):
    """An IPv4 or IPv6 address."""

    metavar = "IP"
    allowed = "an IPv4 or IPv6 address"

    def parse(self, text: str) -> str:
        import _socket  # not socket, whose imports a start would wait for

        text = text.strip()
        try:
            _socket.inet_pton(_socket.AF_INET6 if ":" in text else _socket.AF_INET, text)
        except (OSError, UnicodeError):
            raise ValueError(f"{text!r} is no IP address") from None
        return text


class Mask(Address):
    """A network mask: ones, then zeroes."""

    metavar = "MASK"
    allowed = "a network mask such as 255.255.255.0, or ffff:ffff:ffff:ffff:: for IPv6"

    def parse(self, text: str) -> str:
        import _socket

        text = super().parse(text)
        family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
        bits = "".join(f"{byte:08b}" for byte in _socket.inet_pton(family, text))
        if "01" in bits:
            raise ValueError(f"{text!r} has a one after a zero")
        return text


class Printable(Kind):
    """Printable ASCII, shorter than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.allowed = f"printable ASCII, less than {limit} bytes"

    def parse(self, text: str) -> str:
        if not (text.isascii() and text.isprintable() and len(text) < self.limit):
            raise ValueError("not printable ASCII, or too long")
        return text


class Times(Kind):
    """How often a flag was given."""

    metavar = ""
    allowed = "no value"

    def parse(self, text: str) -> int:
        return units.parse_count(text)


class Tuple(Kind):
    """As many positive numbers as there are ``names``, which are the value's parts in the API."""

    def __init__(self, *names: str, high: int) -> None:
        self.names = names
        self.number = Count(1, high)
        self.metavar = ":".join(name.upper() for name in names)
        self.allowed = f"{self.metavar}, {len(names)} numbers from 1 to {high}"

    def parse(self, text: str) -> tuple[int, ...]:
        numbers = tuple(self.number.parse(part) for part in text.split(":"))
        if len(numbers) != len(self.names):
            raise ValueError(f"{len(numbers)} numbers")
        return numbers

    def format(self, value: tuple[int, ...]) -> str:
        return ":".join(map(str, value))


class Ranges(Kind):
    """Numbers below ``limit``, as ``[0-3,8]`` or one alone; in rising order, each once."""

    def __init__(self, limit: int) -> None:
        self.number = Count(0, limit - 1)
        self.metavar = "[N-N,N]"
        self.allowed = f"{self.metavar}, numbers below {limit}"

    def read(self, raw: str) -> list[int]:
        return self.parse(raw)

    def write(self, value: list[int]) -> str:
        return self.format(value)

    def parse(self, text: str) -> list[int]:
        inner = text[1:-1] if text[:1] + text[-1:] == "[]" else text
        return sorted({number for part in inner.split(",") for number in self._range(part)})

    def format(self, value: list[int]) -> str:
        return f"[{','.join(map(str, value))}]"

    def _range(self, text: str) -> range:
        first, dash, last = text.partition("-")
        low = self.number.parse(first)
        high = self.number.parse(last) if dash else low
        if low > high:
            raise ValueError(f"{text!r} is empty")
        return range(low, high + 1)


class Mapping(Kind):
    """A bracketed list of pairs, ``[KEY@VALUE,...]``, as a dict; a key given twice is an error."""

    def __init__(self, key: Kind, value: Kind) -> None:
        self.key = key
        self.value = value
        self.metavar = f"[{key.metavar}@{value.metavar},...]"
        self.allowed = f"{self.metavar}, {key.allowed} (each once) @ {value.allowed}"

    def read(self, raw: str) -> dict[object, object]:
        if raw[:1] + raw[-1:] != "[]":
            raise ValueError("no brackets")
        pairs = [split(item, "@") for item in split(raw[1:-1])]
        found = {self.key.read(key): self.value.read(value) for key, value in pairs}
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    def write(self, value: dict[object, object]) -> str:
        pairs = (f"{self.key.write(key)}@{self.value.write(each)}" for key, each in value.items())
        return f"[{','.join(pairs)}]"


class Nested(Kind):
    """A struct: a whole option on the command line, an object in the API."""

    metavar = "VALUE"

    def __init__(self, struct: "type[Struct]") -> None:
        self.struct = struct


class Many(Nested):
    """A list of structs: an option that is given once per device, or once with many values."""

"""What a value can be: how it is read, how it is written, and how ``--help`` and errors describe it.

A kind is shared by all fields that take it, and holds no value. ``read`` and ``from_json`` raise ValueError,
to which the caller adds option, key and ``allowed`` or ``json_allowed``.
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

    @property
    def json_allowed(self) -> str:
        """``allowed``, as a client of the API is told."""
        return self.allowed

    def from_json(self, value: object) -> object:
        """The value that ``value``, from a JSON document, stands for. Raises ValueError."""
        if type(value) is not str:
            raise ValueError("no text")
        value.encode()  # UnicodeEncodeError is a ValueError: half a pair of surrogates is no text
        return self.parse(value)

    def to_json(self, value: "Any") -> object:
        """What ``from_json`` turns into ``value``."""
        return value

    def schema(self) -> "dict[str, Any]":
        """What ``from_json`` takes, as JSON Schema."""
        return {"type": "string"}


class Size(Kind):
    """Bytes."""

    metavar = "SIZE"
    allowed = "a number of bytes below 2^64, in decimal, perhaps with K, M, G or T (powers of 1024)"

    def parse(self, text: str) -> int:
        return units.parse_size(text)

    def format(self, value: int) -> str:
        return units.format_size(value)

    json_allowed = "a number of bytes below 2^64"

    def from_json(self, value: object) -> int:
        return _whole(value, 0, units.SIZE_MAX)

    def schema(self) -> "dict[str, Any]":
        return {"type": "integer", "format": "uint64", "minimum": 0, "maximum": units.SIZE_MAX}


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

    def from_json(self, value: object) -> int:
        return _whole(value, self.low, self.high)

    def schema(self) -> "dict[str, Any]":
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


class Switch(Kind):
    metavar = "on|off"
    allowed = "on or off"

    def parse(self, text: str) -> bool:
        return units.parse_switch(text)

    def format(self, value: bool) -> str:
        return units.format_switch(value)

    json_allowed = "true or false"

    def from_json(self, value: object) -> bool:
        if type(value) is not bool:
            raise ValueError("neither true nor false")
        return value

    def schema(self) -> "dict[str, Any]":
        return {"type": "boolean"}


class Choice(Kind):
    """One of a few words; they begin with a capital in the API."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.metavar = "|".join(words)
        self.allowed = f"{', '.join(words[:-1])} or {words[-1]}"

    def parse(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(f"{text!r} is not among them")
        return text

    @property
    def json_allowed(self) -> str:
        words = [word.capitalize() for word in self.words]
        return f"{', '.join(words[:-1])} or {words[-1]}"

    def from_json(self, value: object) -> str:
        for word in self.words:
            if value == word.capitalize():
                return word
        raise ValueError("not among them")

    def to_json(self, value: str) -> str:
        return value.capitalize()

    def schema(self) -> "dict[str, Any]":
        return {"type": "string", "enum": [word.capitalize() for word in self.words]}


class Path(Kind):
    metavar = "PATH"
    allowed = "a path, not an empty one"

    def schema(self) -> "dict[str, Any]":
        return {"type": "string", "pattern": r"^[^\x00]+$"}

    def parse(self, text: str) -> str:
        if not text or "\0" in text:
            raise ValueError("no path")
        return text


class FileUrl(Path):
    """A path, written as ``file:///path``; nothing in it is escaped."""

    metavar = "URL"
    allowed = "file:// and an absolute path"

    def parse(self, text: str) -> str:
        path = super().parse(text).removeprefix("file://")
        if not text.startswith("file:///") or path == "/":
            raise ValueError("no file:// or no path")
        return path

    def format(self, value: str) -> str:
        return f"file://{value}"

    def to_json(self, value: str) -> str:
        return self.format(value)

    def schema(self) -> "dict[str, Any]":
        return {"type": "string", "pattern": r"^file:///[^\x00]+$"}


class Interface(Kind):
    """The name of a network interface."""

    metavar = "NAME"
    allowed = "an interface's name, 1 to 15 bytes without blanks, / : or %"

    def parse(self, text: str) -> str:
        raw = os.fsencode(text)
        if not 1 <= len(raw) <= 15 or text in (".", "..") or not FORBIDDEN_IN_NAMES.isdisjoint(raw):
            raise ValueError(f"{text!r} is no name of an interface")
        return text

    def schema(self) -> "dict[str, Any]":
        return {"type": "string", "minLength": 1, "maxLength": 15}


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

    def schema(self) -> "dict[str, Any]":
        return {"type": "string", "pattern": "^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$"}


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

    def schema(self) -> "dict[str, Any]":
        return {"type": "string", "pattern": "^[ -~]*$", "maxLength": self.limit - 1}


class Times(Kind):
    """How often a flag was given."""

    metavar = ""
    allowed = "no value"

    def parse(self, text: str) -> int:
        return units.parse_count(text)


class Tuple(Kind):
    """As many numbers as there are ``names``; ``wire`` are the names of these parts in the API."""

    def __init__(self, *names: str, high: int, low: int = 1, wire: tuple[str, ...] = ()) -> None:
        self.names = names
        self.wire = wire or names
        self.number = Count(low, high)
        self.metavar = ":".join(name.upper() for name in names)
        self.allowed = f"{self.metavar}, {len(names)} numbers from {low} to {high}"

    def parse(self, text: str) -> tuple[int, ...]:
        numbers = tuple(self.number.parse(part) for part in text.split(":"))
        if len(numbers) != len(self.names):
            raise ValueError(f"{len(numbers)} numbers")
        return numbers

    def format(self, value: tuple[int, ...]) -> str:
        return ":".join(map(str, value))

    @property
    def json_allowed(self) -> str:
        return f"an object of {', '.join(self.wire)}, which are {self.number.allowed}"

    def from_json(self, value: object) -> tuple[int, ...]:
        parts = _object(value, self.wire)
        return tuple(self.number.from_json(parts[name]) for name in self.wire)

    def to_json(self, value: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.wire, value, strict=True))

    def schema(self) -> "dict[str, Any]":
        return _object_schema(dict.fromkeys(self.wire, self.number.schema()))


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

    @property
    def json_allowed(self) -> str:
        return f"a list of numbers below {self.number.high + 1}, not an empty one"

    def from_json(self, value: object) -> list[int]:
        if type(value) is not list or not value:
            raise ValueError("no list, or an empty one")
        return sorted({self.number.from_json(each) for each in value})

    def schema(self) -> "dict[str, Any]":
        return {"type": "array", "items": self.number.schema(), "minItems": 1}

    def _range(self, text: str) -> range:
        first, dash, last = text.partition("-")
        low = self.number.parse(first)
        high = self.number.parse(last) if dash else low
        if low > high:
            raise ValueError(f"{text!r} is empty")
        return range(low, high + 1)


class Mapping(Kind):
    """A bracketed list of pairs, ``[KEY@VALUE,...]``, as a dict; a key given twice is an error.

    In the API it is a list of objects, whose two keys are ``wire``.
    """

    def __init__(self, key: Kind, value: Kind, wire: tuple[str, str] = ("key", "value")) -> None:
        self.key = key
        self.value = value
        self.wire = wire
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

    @property
    def json_allowed(self) -> str:
        key, value = self.wire
        key_allowed, value_allowed = self.key.json_allowed, self.value.json_allowed
        return f"a list of objects, {key}: {key_allowed} (each once), {value}: {value_allowed}"

    def from_json(self, value: object) -> dict[object, object]:
        if type(value) is not list:
            raise ValueError("no list")
        key, each = self.wire
        pairs = [_object(item, self.wire) for item in value]
        found = {self.key.from_json(pair[key]): self.value.from_json(pair[each]) for pair in pairs}
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    def to_json(self, value: dict[object, object]) -> list[dict[str, object]]:
        key, each = self.wire
        return [{key: self.key.to_json(one), each: self.value.to_json(other)} for one, other in value.items()]

    def schema(self) -> "dict[str, Any]":
        key, value = self.wire
        return {
            "type": "array",
            "items": _object_schema({key: self.key.schema(), value: self.value.schema()}),
        }


class Nested(Kind):
    """A struct: a whole option on the command line, an object in the API."""

    metavar = "VALUE"

    def __init__(self, struct: "type[Struct]") -> None:
        self.struct = struct


class Many(Nested):
    """A list of structs: an option that is given once per device, or once with many values."""


def _whole(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # bool is another type here
        raise ValueError(f"no whole number from {low} to {high}")
    return value


def _object(value: object, names: tuple[str, ...]) -> "dict[str, Any]":
    """``value``, an object with exactly these ``names``."""
    if type(value) is not dict or value.keys() != set(names):
        raise ValueError(f"no object of {', '.join(names)}")
    return value


def _object_schema(properties: "dict[str, Any]") -> "dict[str, Any]":
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }

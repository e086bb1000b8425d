"""The text of an option: ``key=value,key=value`` to a struct and back.

The order of keys is free, and of a key given twice the last wins. Commas inside ``"…"`` and ``[…]`` do not
separate; inside quotes ``""`` is one quote. An empty value means the default of its key. A value without a
key goes to the key that the struct names as ``bare`` (``--cpus 4``, ``--serial tty``).
"""

from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from pileus.config.declare import Field, Struct

    S = TypeVar("S", bound=Struct)

SPECIAL = frozenset(',"[]=')  # what a value may hold only in quotes
SHOWN = 100  # characters of a value that an error repeats


def parse(struct: "type[S]", option: str, text: str) -> "S":
    """The ``struct`` that ``text`` describes. Raises ConfigError in the name of ``option``."""
    given = {_key(struct, option, piece): piece for piece in _pieces(option, text)}
    told = {key: piece for key, piece in given.items() if _cut(piece)[1]}
    values = {key: _value(struct.fields[key], option, piece) for key, piece in told.items()}
    for field in map(struct.fields.__getitem__, given):
        if field.implies is not None:
            values.setdefault(*field.implies)
    for key, field in struct.fields.items():
        if field.required and key not in values:
            raise ConfigError(option, shown(text), f"{key}= is required")
    return struct(**values)


def format_struct(struct: "Struct", *keys: str) -> str:
    """The text that ``parse`` turns into an equal ``struct``, or the part of it that is about ``keys``."""
    names = keys or _telling(struct)
    return ",".join(_written(struct, name) for name in names)


def split(text: str, separator: str = ",") -> list[str]:
    """Cut ``text`` where ``separator`` stands outside quotes and brackets, which stay in the pieces."""
    pieces, start, depth, quoted = [], 0, 0, False
    for index, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char == separator and not depth:
            pieces.append(text[start:index])
            start = index + 1
        elif char in "[]":
            depth += 1 if char == "[" else -1
            if depth < 0:
                raise ValueError("a ] has no [ before it")
    if quoted or depth:
        raise ValueError('a " is not closed' if quoted else "a [ is not closed")
    return [*pieces, text[start:]]


def unquote(raw: str) -> str:
    """The value that ``raw`` stands for: quotes dropped, a doubled quote inside quotes kept as one."""
    parts = raw.split('"')  # outside, inside, outside, …
    for index in range(2, len(parts) - 1, 2):
        parts[index] = parts[index] or '"'
    return "".join(parts)


def quote(value: str) -> str:
    """What ``unquote`` and ``split`` read as exactly ``value``."""
    if value and SPECIAL.isdisjoint(value):
        return value
    return '"' + value.replace('"', '""') + '"'


def shown(text: str) -> str:
    """``text`` as it can stand in an error: visible where empty, and short."""
    return (text or '""') if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _pieces(option: str, text: str) -> list[str]:
    try:
        pieces = split(text)
    except ValueError as error:
        raise ConfigError(option, shown(text), f"{error}; put a value that holds [ or ] in quotes") from None
    if not all(piece.strip() for piece in pieces):
        where = "an item between two commas" if text.strip() else "the value"
        raise ConfigError(option, shown(text), f"{where} is empty; write key=value,key=value")
    return pieces


def _cut(piece: str) -> tuple[str | None, str]:
    """The key of ``piece``, None where it has none, and the raw value."""
    key, equals, raw = piece.partition("=")
    return (key.strip(), raw) if equals and '"' not in key else (None, piece)


def _key(struct: "type[Struct]", option: str, piece: str) -> str:
    key = _cut(piece)[0]
    if key is None and struct.bare is not None:
        return struct.bare
    if not key:
        problem = "write key=value" if key is None else "the key before = is missing"
    elif (name := struct.aliases.get(key, key)) in struct.fields:
        return name
    else:
        problem = f"there is no key {shown(key)}"
    raise ConfigError(option, shown(piece), f"{problem}; keys are {', '.join(struct.fields)}")


def _value(field: "Field", option: str, piece: str) -> object:
    try:
        return field.kind.read(_cut(piece)[1])
    except ValueError:
        raise ConfigError(option, shown(piece), f"{field.name} takes {field.kind.allowed}") from None


def _telling(struct: "Struct") -> list[str]:
    """The keys worth writing: those with a value that no other key implies."""
    told = {name: field for name, field in struct.fields.items() if getattr(struct, name) not in (None, [])}
    implied = {field.implies[0] for field in told.values() if field.implies is not None}
    return [name for name in told if name not in implied]


def _written(struct: "Struct", name: str) -> str:
    value = getattr(struct, name)
    return f"{name}={'' if value is None else struct.fields[name].kind.write(value)}"

"""Hypothesis strategies for every kind and every struct, derived from the model's own declaration."""

from ipaddress import IPv4Address
from typing import Any

from hypothesis import strategies as st

from pileus.config import kinds
from pileus.config.declare import Field, Struct

# argv holds any characters but NUL, among them lone surrogates for bytes that are no UTF-8.
ARGUMENTS = st.text(st.characters(exclude_characters="\0", codec=None), max_size=30)
PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0x7E)


def of_kind(kind: kinds.Kind) -> st.SearchStrategy[Any]:  # noqa: PLR0911, PLR0912 - a table with types for keys
    """Values that ``kind`` can write."""
    match kind:
        case kinds.Mapping(key=key, value=value):
            return st.dictionaries(of_kind(key), of_kind(value), min_size=1, max_size=4)
        case kinds.Ranges(number=number):
            numbers = st.integers(number.low, number.high)
            return st.sets(numbers, min_size=1, max_size=5).map(sorted)
        case kinds.Tuple(names=names, number=number):
            return st.tuples(*[of_kind(number)] * len(names))
        case kinds.Count(low=low, high=high):
            return st.integers(low, high)
        case kinds.Choice(words=words):
            return st.sampled_from(words)
        case kinds.Size():
            return st.integers(0, (1 << 64) - 1)
        case kinds.Switch():
            return st.booleans()
        case kinds.Interface():
            return st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,14}", fullmatch=True)
        case kinds.Mac():
            return st.binary(min_size=5, max_size=5).map(lambda rest: (b"\x2e" + rest).hex(":"))
        case kinds.Mask():
            return st.integers(0, 32).map(lambda ones: str(IPv4Address((1 << 32) - (1 << 32 - ones))))
        case kinds.Address():
            return st.ip_addresses().map(str)
        case kinds.Path():
            return ARGUMENTS.filter(bool)
        case kinds.Printable(limit=limit):
            return st.text(PRINTABLE, max_size=min(limit - 1, 30))
        case _:
            raise NotImplementedError(type(kind))


def of_struct(struct: type[Struct]) -> st.SearchStrategy[Struct]:
    """Structs with any of their fields given, the others at their defaults."""
    named = {name: of_kind(field.kind) for name, field in struct.fields.items()}
    needed = {name: values for name, values in named.items() if struct.fields[name].required}
    optional = {name: values for name, values in named.items() if name not in needed}
    return (
        st.fixed_dictionaries(needed, optional=optional).map(lambda values: struct(**values)).filter(_sound)
    )


def _sound(struct: Struct) -> bool:
    """Whether a field that implies another one's value has its way, as it has in text."""
    told = [field for name, field in struct.fields.items() if getattr(struct, name) is not None]
    return all(_obeyed(struct, field) for field in told)


def _obeyed(struct: Struct, field: Field) -> bool:
    return field.implies is None or getattr(struct, field.implies[0]) == field.implies[1]

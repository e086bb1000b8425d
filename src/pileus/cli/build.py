"""The texts of options to a configuration: each goes through its field's kind to its field."""

from __future__ import annotations

from pileus.cli.options import COUNT, LIST, Option
from pileus.config.grammar import parse, shown
from pileus.config.kinds import Nested
from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, TypeVar

    from pileus.config.declare import Field, Struct

    S = TypeVar("S", bound=Struct)


def build(root: type[S], options: Iterable[Option], given: dict[str, list[str]]) -> S:
    """``root`` with what was ``given``, and defaults for the rest. Raises ConfigError."""
    tree: dict[str, Any] = {}
    for option in options:
        if option.target and option.flag in given:
            *parents, name = option.target.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[name] = _value(option, field_at(root, option.target), given[option.flag])
    return _grow(root, tree)


def field_at(root: type[Struct], target: str) -> Field:
    """The field at the dotted path ``target`` below ``root``."""
    *parents, name = target.split(".")
    for parent in parents:
        root = struct_of(root.fields[parent])
    return root.fields[name]


def struct_of(field: Field) -> type[Struct]:
    """The struct that the value of a nested ``field`` is."""
    assert isinstance(field.kind, Nested)
    return field.kind.struct


def _grow(struct: type[S], tree: dict[str, Any]) -> S:
    """A ``struct`` of ``tree``, in which structs that are still to be made are dicts."""
    values = {
        name: _grow(struct_of(struct.fields[name]), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return struct(**values)


def _value(option: Option, field: Field, texts: list[str]) -> object:
    if option.takes == COUNT:
        return len(texts)
    if option.takes == LIST:
        return [parse(struct_of(field), option.flag, text) for text in texts]
    if isinstance(field.kind, Nested):
        return parse(field.kind.struct, option.flag, texts[0]) if texts else field.kind.struct()
    if not texts:
        hint = f"a value that starts with - is written {option.flag}=VALUE"
        raise ConfigError(option.flag, "without a value", f"it takes {field.kind.allowed}; {hint}")
    try:
        return field.kind.parse(texts[0])
    except ValueError:
        raise ConfigError(option.flag, shown(texts[0]), f"it takes {field.kind.allowed}") from None

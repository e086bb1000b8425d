"""The words of a command line to a configuration: ``scan`` finds what each flag is given, ``build`` reads it.

``--flag value`` and ``--flag=value`` are the same; a value that starts with ``-`` needs the second form.
Flags are never abbreviated.
"""

from pileus.cli.options import COUNT, LIST, SINGLE, SWITCH, Option
from pileus.config.grammar import parse, shown
from pileus.config.kinds import Nested
from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, TypeVar

    from pileus.config.declare import Field, Struct

    S = TypeVar("S", bound=Struct)
    Given = dict[str, list[str]]  # flag -> texts; of a count or a switch, one empty text each time


def scan(words: list[str], options: "Iterable[Option]") -> "Given":
    """The texts given for each flag; none for a single option without a value. Raises ConfigError."""
    options = tuple(options)
    flags = {name: option for option in options for name in (option.flag, option.short) if name}
    given: Given = {}
    position = 0
    while position < len(words):
        name, equals, text = words[position].partition("=")
        position += 1
        option, times = _find(flags, name)
        values = [text] if equals else _values(option, words, position)
        position += 0 if equals else len(values)
        _note(given, option, values, times, bool(equals))
    return given


def build(root: "type[S]", options: "Iterable[Option]", given: "Given") -> "S":
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


def field_at(root: "type[Struct]", target: str) -> "Field":
    """The field at the dotted path ``target`` below ``root``."""
    *parents, name = target.split(".")
    for parent in parents:
        root = struct_of(root.fields[parent])
    return root.fields[name]


def struct_of(field: "Field") -> "type[Struct]":
    """The struct that the value of a nested ``field`` is."""
    assert isinstance(field.kind, Nested)
    return field.kind.struct


def _find(flags: dict[str, Option], name: str) -> tuple[Option, int]:
    """The option that ``name`` is, and how many of it: more than one for ``-vv``."""
    if name in flags:
        return flags[name], 1
    letter = flags.get(name[:2])
    if letter is not None and letter.takes == COUNT and name == "-" + name[1:2] * (len(name) - 1):
        return letter, len(name) - 1
    raise _unknown(flags, name)


def _values(option: Option, words: list[str], position: int) -> list[str]:
    """The words from ``position`` on that are values of ``option``."""
    most = {SINGLE: 1, LIST: len(words)}.get(option.takes, 0)
    end = position
    while end < len(words) and end - position < most and not words[end].startswith("-"):
        end += 1
    return words[position:end]


def _note(given: "Given", option: Option, values: list[str], times: int, equals: bool) -> None:
    flag = option.flag
    if option.takes in (COUNT, SWITCH):
        if equals:
            raise ConfigError(flag, shown(values[0]), "it takes no value")
        values = [""] * times
    if option.takes == LIST and not values:
        raise ConfigError(flag, "without a value", "it takes one or more; see --help")
    if option.takes == SINGLE and flag in given:
        raise ConfigError(flag, shown(" ".join(values)), "it may be given only once")
    given.setdefault(flag, []).extend(values)


def _unknown(flags: dict[str, Option], name: str) -> ConfigError:
    if not name.startswith("-"):
        return ConfigError("argument", shown(name), "an option is needed here; see --help")
    from difflib import get_close_matches

    nearest = get_close_matches(name, [flag for flag in flags if flag.startswith("--")], 1)
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
    return ConfigError("option", shown(name), f"there is no such option; {hint}")


def _grow(struct: "type[S]", tree: "dict[str, Any]") -> "S":
    """A ``struct`` of ``tree``, in which structs that are still to be made are dicts."""
    values = {
        name: _grow(struct_of(struct.fields[name]), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return struct(**values)


def _value(option: Option, field: "Field", texts: list[str]) -> object:
    if option.takes == COUNT:
        return len(texts)
    if option.takes == LIST:
        return [parse(struct_of(field), option.flag, text) for text in texts]
    if isinstance(field.kind, Nested):
        struct = field.kind.struct
        if not texts and not any(each.required for each in struct.fields.values()):
            return struct()
        return parse(struct, option.flag, texts[0] if texts else "")
    if not texts:
        hint = f"a value that starts with - is written {option.flag}=VALUE"
        raise ConfigError(option.flag, "without a value", f"it takes {field.kind.allowed}; {hint}")
    try:
        return field.kind.parse(texts[0])
    except ValueError:
        raise ConfigError(option.flag, shown(texts[0]), f"it takes {field.kind.allowed}") from None

"""The text of ``--help``, in 80 columns: every option, every key, what it takes and its default."""

import textwrap
from collections.abc import Iterator

from pileus import __version__
from pileus.cli.args import field_at
from pileus.cli.options import COUNT, GROUPS, LIST, Option
from pileus.config.declare import Field, Struct
from pileus.config.kinds import Choice, Nested, Path, Size, Switch, Times
from pileus.config.model import VmmConfig

WIDTH = 80
SELF_EXPLAINING = (Choice, Switch, Path, Size, Times)  # their metavar, or the introduction, says it all
HEAD = f"""\
pileus {__version__}: a virtual machine monitor for KVM

Usage: pileus --kernel PATH [OPTION [VALUE]]...
"""
INTRODUCTION = """\

A VALUE with keys is written key=value,key=value, in any order; a key in [ ] may
be left out. An empty value means the default. Commas within quotes or brackets
do not separate: path="/a,b". SIZE is a number of bytes, perhaps with K, M, G or
T (powers of 1024). A value that starts with - is written --option=VALUE.
"""


def usage(
    groups: dict[str, tuple[Option, ...]] = GROUPS, root: type[Struct] = VmmConfig, head: str = HEAD
) -> str:
    """The whole text, ending in a newline."""
    lines = [f"{head}{INTRODUCTION}"]
    for title, options in groups.items():
        lines.append(f"{title}:")
        for option in options:
            lines.extend(_option(option, root))
        lines.append("")
    return "\n".join(lines)


def _option(option: Option, root: type[Struct]) -> Iterator[str]:
    flags = f"  {option.short + ', ' if option.short else ''}{option.flag}"
    if not option.target:
        yield from _entry(flags, option.help)
        return
    field = field_at(root, option.target)
    many = "..." if option.takes == LIST else " (repeatable)" if option.takes == COUNT else ""
    about = field.help if isinstance(field.kind, Nested) else _sentence(field)
    yield from _entry(f"{flags} {field.kind.metavar}".rstrip() + many, about)
    if isinstance(field.kind, Nested):
        for key in field.kind.struct.fields.values():
            yield from _entry(f"      {_key(field.kind.struct, key)}", _sentence(key))


def _key(struct: type[Struct], key: Field) -> str:
    """``key=VALUE`` as it is written; words that another key stands for are left to that key."""
    implied = {other.implies[1] for other in struct.fields.values() if other.implies is not None}
    words = [word for word in key.kind.metavar.split("|") if word not in implied]
    name = f"[{key.name}=]" if key.name == struct.bare else f"{key.name}="
    return name + "|".join(words)


def _sentence(field: Field) -> str:
    kind = field.kind
    takes = "" if isinstance(kind, SELF_EXPLAINING) else f": {kind.allowed.removeprefix(f'{kind.metavar}, ')}"
    return f"{field.help}{takes} ({_default(field)})"


def _default(field: Field) -> str:
    if field.required:
        return "required"
    if field.default_help is not None:
        return f"default: {field.default_help}"
    return f"default: {'none' if field.default is None else field.kind.format(field.default)}"


def _entry(head: str, about: str) -> list[str]:
    """``head``, and ``about`` beside it or, where that is too narrow, below it."""
    indent = " " * 30
    beside = head.ljust(len(indent)) if len(head) < len(indent) - 1 else ""
    lines = textwrap.wrap(about, WIDTH, initial_indent=beside or indent, subsequent_indent=indent)
    return lines if beside else [head, *lines]

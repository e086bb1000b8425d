"""--help tells all that the options take."""

import pytest

from pileus.cli.args import field_at
from pileus.cli.help import WIDTH, usage
from pileus.cli.options import GROUPS, OPTIONS, Option
from pileus.config.declare import Struct
from pileus.config.kinds import Nested
from pileus.config.model import VmmConfig

from . import devices


def section(text: str, flag: str) -> str:
    """The part of ``text`` about ``flag``, with blanks made single."""
    lines = text.splitlines()
    heads = [index for index, line in enumerate(lines) if line[:3] == "  -" or line[:1] > " "]
    start = next(index for index in heads if lines[index][0] == " " and flag in lines[index].split())
    end = next((index for index in heads if index > start), len(lines))
    return " ".join(" ".join(lines[start:end]).split())


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_every_option_and_key_is_explained(option: Option) -> None:
    told = section(usage(), option.flag)
    if not option.target:
        assert option.help in told
        return
    field = field_at(VmmConfig, option.target)
    assert " ".join(field.help.split()) in told
    if isinstance(field.kind, Nested):
        for key in field.kind.struct.fields.values():
            assert f"{key.name}=" in told
            assert key.help in told


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_every_default_is_told(option: Option) -> None:
    if not option.target:
        return
    field = field_at(VmmConfig, option.target)
    keys = list(field.kind.struct.fields.values()) if isinstance(field.kind, Nested) else [field]
    assert section(usage(), option.flag).count("(default: ") == sum(not key.required for key in keys)


def test_it_fits_into_80_columns_of_ascii() -> None:
    assert usage().isascii()
    assert max(map(len, usage().splitlines())) <= WIDTH


def test_a_key_is_shown_as_it_is_written() -> None:
    assert "[boot=]N vCPUs that run from the start: a whole number from 1 to 4096 (default: 1)" in section(
        usage(), "--cpus"
    )
    assert "[mode=]off|null|tty|pty off is" in section(usage(), "--serial")
    assert "file=PATH" in section(usage(), "--serial")


def test_lists_and_required_keys_are_marked() -> None:
    text = usage({"Devices": devices.OPTIONS}, devices.Root)
    assert "--disk VALUE... disks path=PATH the image (required)" in " ".join(text.split())


def test_every_field_has_an_option() -> None:
    reached = {name for option in OPTIONS if option.target for name in _prefixes(option.target)}
    assert _targets(VmmConfig, "") <= reached


def _prefixes(target: str) -> list[str]:
    names = target.split(".")
    return [".".join(names[:count]) for count in range(1, len(names) + 1)]


def _targets(struct: type[Struct], prefix: str) -> set[str]:
    """The dotted paths of structs within structs, down to what one option holds."""
    found: set[str] = set()
    for name, field in struct.fields.items():
        found.add(prefix + name)
        if prefix + name in {"vm", "vm.payload"}:
            assert isinstance(field.kind, Nested)
            found |= _targets(field.kind.struct, f"{prefix}{name}.")
    return found


def test_flags_are_unique() -> None:
    flags = [flag for option in OPTIONS for flag in (option.flag, option.short) if flag]
    assert len(flags) == len(set(flags))
    assert sum(map(len, GROUPS.values())) == len(OPTIONS)

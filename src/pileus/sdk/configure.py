"""A VM's configuration of Python values, by the names of the one model.

Each word of ``VmConfig`` takes one of its structs, a dict of its fields, the text of the command line's
option, or, where a struct has a field for values without a key, such a value (``cpus=2``, ``memory="1G"``). A
path alone is a disk. ``kernel``, ``cmdline`` and ``initramfs`` are words of their own.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from pileus.config.check import check_vm
from pileus.config.declare import Field, Struct
from pileus.config.grammar import parse, shown
from pileus.config.kinds import Many, Nested
from pileus.config.model import ConsoleConfig, PayloadConfig, SerialConfig, VmConfig
from pileus.errors import ConfigError

S = TypeVar("S", bound=Struct)
PATHS = {"disks": "path"}  # what a path alone is for


def configure(**words: Any) -> VmConfig:
    """The checked configuration; what is None is not given. Raises ConfigError."""
    given = {name: value for name, value in words.items() if value is not None}
    payload = {name: given.pop(name) for name in PayloadConfig.fields if name in given}
    if payload:
        given["payload"] = payload
    for name in given:
        if name not in VmConfig.fields:
            raise ConfigError(name, "is unknown", f"words are {', '.join([*payload_words(), *vm_words()])}")
    values = {name: _value(VmConfig.fields[name], value, name) for name, value in given.items()}
    values.setdefault("serial", SerialConfig())
    values.setdefault("console", ConsoleConfig(mode="off"))  # a program's terminal is its own
    config = VmConfig(**values)
    check_vm(config)
    return config


def payload_words() -> list[str]:
    return list(PayloadConfig.fields)


def vm_words() -> list[str]:
    return [name for name in VmConfig.fields if name != "payload"]


def _value(field: Field, value: Any, where: str) -> Any:
    kind = field.kind
    if isinstance(kind, Many):
        if isinstance(value, (str, os.PathLike, Mapping, Struct)) or not hasattr(value, "__iter__"):
            raise ConfigError(where, shown(repr(value)), "it takes a list")
        return [
            _struct(kind.struct, each, f"{where}[{index}]", PATHS.get(where))
            for index, each in enumerate(value)
        ]
    if isinstance(kind, Nested):
        return _struct(kind.struct, value, where, kind.struct.bare)
    return _plain(field, value, where)


def _struct(struct: type[S], value: Any, where: str, bare: str | None) -> S:
    if isinstance(value, struct):
        return value
    if isinstance(value, Struct):
        raise ConfigError(where, shown(repr(value)), f"it takes a {struct.__name__}")
    if isinstance(value, Mapping):
        return _of_mapping(struct, value, where)
    if isinstance(value, str) and (struct.bare == bare or "=" in value):
        return parse(struct, where, value)
    if bare is None:
        raise ConfigError(
            where, shown(repr(value)), f"it takes a {struct.__name__}, a dict or the text of an option"
        )
    return _of_mapping(struct, {bare: value}, where)


def _of_mapping(struct: type[S], value: Mapping[str, Any], where: str) -> S:
    for name in value:
        if name not in struct.fields:
            raise ConfigError(f"{where}.{name}", "is unknown", f"keys are {', '.join(struct.fields)}")
    told = {name: each for name, each in value.items() if each is not None}
    values = {name: _value(struct.fields[name], each, f"{where}.{name}") for name, each in told.items()}
    for name in told:
        if (implied := struct.fields[name].implies) is not None:
            values.setdefault(*implied)
    for name, field in struct.fields.items():
        if field.required and name not in values:
            raise ConfigError(f"{where}.{name}", "is missing", f"it takes {field.kind.allowed}")
    return struct(**values)


def _plain(field: Field, value: Any, where: str) -> Any:
    """What the field's kind makes of ``value``: of text by its rules, of all else by how it is written."""
    kind = field.kind
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    try:
        made = kind.parse(value) if isinstance(value, str) else kind.read(kind.write(value))
        if isinstance(value, str) or made == value or isinstance(value, (list, tuple, range, set)):
            return made
    except (ValueError, TypeError, AttributeError):
        pass
    raise ConfigError(where, shown(repr(value)), f"it takes {kind.allowed}")

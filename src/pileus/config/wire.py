"""A configuration as JSON: the structs that ``grammar`` reads, by the names that the API gives their fields.

Null means that a field is not given. ``generations`` knows the names that only some clients use.
"""

import json

from pileus.config.declare import Field, Struct
from pileus.config.grammar import shown
from pileus.config.kinds import Many, Nested
from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    S = TypeVar("S", bound=Struct)
    Json = Any


def decode(struct: "type[S]", value: "Json", where: str = "") -> "S":
    """The ``struct`` that the object ``value`` describes, found at ``where``. Raises ConfigError."""
    if type(value) is not dict:
        raise refused(where or "the body", value, "it takes an object")
    fields = wire_fields(struct)
    for name in value:
        if name not in fields:
            raise ConfigError(join(where, name), "is unknown", f"fields are {', '.join(fields)}")
    given = {fields[name].name: (fields[name], name) for name in value if value[name] is not None}
    values = {key: _value(field, value[name], join(where, name)) for key, (field, name) in given.items()}
    for field, _ in given.values():
        if field.implies is not None:
            values.setdefault(*field.implies)
    for name, field in fields.items():
        if field.required and field.name not in values:
            raise ConfigError(join(where, name), "is missing", f"it takes {field.kind.json_allowed}")
    return struct(**values)


def encode(struct: Struct) -> "dict[str, Json]":
    """The object that ``decode`` turns into an equal ``struct``; what is not set is null."""
    return {
        name: _encoded(field, getattr(struct, field.name))
        for name, field in wire_fields(type(struct)).items()
    }


def schema(struct: type[Struct]) -> "dict[str, Json]":
    """What ``decode`` takes, as JSON Schema 2020-12; other structs by reference, as OpenAPI keeps them."""
    properties = {name: _schema(field) for name, field in wire_fields(struct).items()}
    required = [name for name, field in wire_fields(struct).items() if field.required]
    return {
        "type": "object",
        "description": " ".join((struct.__doc__ or "").split()),
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def structs(root: type[Struct]) -> list[type[Struct]]:
    """``root`` and all the structs below it, each once."""
    found = [root]
    for struct in found:
        for field in struct.fields.values():
            if isinstance(field.kind, Nested) and field.kind.struct not in found:
                found.append(field.kind.struct)
    return found


def wire_fields(struct: type[Struct]) -> dict[str, Field]:
    """The fields of ``struct`` by their names in the API."""
    return {field.wire or name: field for name, field in struct.fields.items()}


def join(where: str, name: str) -> str:
    """The path of the field ``name`` of the object at ``where``, fit for an error."""
    return f"{where}.{shown(name)}" if where else shown(name)


def refused(where: str, value: "Json", allowed: str) -> ConfigError:
    return ConfigError(where, shown(json.dumps(value)), allowed)


def _value(field: Field, value: "Json", where: str) -> object:
    kind = field.kind
    if isinstance(kind, Many):
        if type(value) is not list:
            raise refused(where, value, "it takes a list of objects")
        return [decode(kind.struct, each, f"{where}[{index}]") for index, each in enumerate(value)]
    if isinstance(kind, Nested):
        return decode(kind.struct, value, where)
    try:
        return kind.from_json(value)
    except ValueError:
        raise refused(where, value, f"it takes {kind.json_allowed}") from None


def _encoded(field: Field, value: "Any") -> "Json":
    if value is None:
        return None
    if isinstance(field.kind, Many):
        return [encode(each) for each in value]
    return encode(value) if isinstance(field.kind, Nested) else field.kind.to_json(value)


def _schema(field: Field) -> "dict[str, Json]":
    kind = field.kind
    if isinstance(kind, Nested):
        inner: dict[str, Json] = {"$ref": f"#/components/schemas/{kind.struct.__name__}"}
        if isinstance(kind, Many):
            inner = {"type": "array", "items": inner}
    else:
        inner = kind.schema()
    about = field.help if field.default_help is None else f"{field.help} (default: {field.default_help})"
    if field.required:
        return {**inner, "description": about}
    told: dict[str, Json] = {"description": about}
    if field.default is not None:
        told["default"] = _encoded(field, field.default)
    if "$ref" in inner or "enum" in inner:
        return {"anyOf": [inner, {"type": "null"}], **told}
    return {**inner, "type": [inner["type"], "null"], **told}

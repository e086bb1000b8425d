"""How ``model`` declares what can be configured: structs of fields, each known by kind, default and help.

A twentieth of ``dataclasses``, and of its cost at start. One declaration serves the command line, its help
and its errors; the API and its schema will read the same ``Struct.fields``, by the fields' ``wire`` names.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, dataclass_transform

    from pileus.config.kinds import Kind
else:

    def dataclass_transform(**_):
        return lambda cls: cls


class Field:
    """One value of a struct. ``name`` is its attribute and its key on the command line."""

    __slots__ = ("default", "default_help", "factory", "help", "implies", "kind", "name", "required", "wire")

    def __init__(self, kind: "Kind", help: str, **about: "Any") -> None:
        self.name = ""  # the struct that holds it fills this in
        self.kind = kind
        self.help = help
        self.required = not ("default" in about or "factory" in about)
        self.default: object = about.get("default")
        self.factory: Callable[[Any], object] | None = about.get("factory")
        self.default_help: str | None = about.get("default_help")
        self.implies: tuple[str, object] | None = about.get("implies")
        self.wire: str | None = about.get("wire")

    def value_for(self, struct: "Struct") -> object:
        """The default in ``struct``, whose earlier fields are set already."""
        return self.default if self.factory is None else self.factory(struct)


def field(kind: "Kind", help: str, **about: "Any") -> "Any":
    """Declare a field: of which ``kind``, and one sentence of ``help``.

    ``default`` is its value when it is not given, or ``factory`` makes one from the struct's earlier fields;
    with neither it is required. ``default_help`` says in words what the default is. ``implies`` is another
    field and the value it takes when this one is given. ``wire`` is its name in the API, where it differs.
    """
    return Field(kind, help, **about)


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class Struct:  # noqa: PLW1641 - its instances change, so they have no hash
    """Plain data: made by keyword, compared by value."""

    fields: "ClassVar[dict[str, Field]]" = {}  # noqa: RUF012 - a subclass gets its own
    bare: "ClassVar[str | None]" = None  # the field that a value without a key is for
    aliases: "ClassVar[dict[str, str]]" = {}  # noqa: RUF012 - keys of old, and the fields they name today

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        for name, each in own.items():
            each.name = name
        cls.fields = cls.fields | own

    def __init__(self, **values: "Any") -> None:
        if unknown := values.keys() - self.fields.keys():
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        for name, each in self.fields.items():
            if name not in values and each.required:
                raise TypeError(f"{type(self).__name__} needs {name}")
            setattr(self, name, values[name] if name in values else each.value_for(self))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

"""The declarative base."""

import pytest

from pileus.config.declare import Struct, field
from pileus.config.kinds import Count, Kind, Path


class Room(Struct):
    doors: int = field(Count(0, 9), "how many doors")
    windows: int = field(Count(0, 9), "how many windows", factory=lambda room: room.doors + 1)
    name: str | None = field(Kind(), "what it is called", default=None, wire="room_name")


class Cellar(Room):
    name: str = field(Path(), "what it is called", default="cellar")
    deep: int = field(Count(0, 9), "how deep", default=1)


def test_defaults_fill_what_is_not_given() -> None:
    room = Room(doors=2)
    assert (room.doors, room.windows, room.name) == (2, 3, None)
    assert Room(doors=2, windows=0).windows == 0


def test_a_missing_or_unknown_field_is_a_bug_of_the_caller() -> None:
    with pytest.raises(TypeError, match="Room needs doors"):
        Room()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Room has no field chimney"):
        Room(doors=1, chimney=1)  # type: ignore[call-arg]


def test_structs_compare_by_type_and_values() -> None:
    assert Room(doors=1) == Room(doors=1, windows=2)
    assert Room(doors=1) != Room(doors=2)
    assert Room(doors=1) != Cellar(doors=1)


def test_a_struct_prints_as_it_is_made() -> None:
    assert repr(Room(doors=1, name="hall")) == "Room(doors=1, windows=2, name='hall')"


def test_a_derived_struct_keeps_the_order_and_may_change_a_field() -> None:
    assert list(Cellar.fields) == ["doors", "windows", "name", "deep"]
    assert Cellar(doors=0).name == "cellar"
    assert Room(doors=0).name is None


def test_a_field_knows_its_names() -> None:
    assert [each.name for each in Room.fields.values()] == ["doors", "windows", "name"]
    assert Room.fields["name"].wire == "room_name"
    assert [each.required for each in Room.fields.values()] == [True, False, False]

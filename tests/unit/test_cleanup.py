"""What was made last is undone first, whatever fails."""

import pytest

from pileus.cleanup import Cleanup


class Thing:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told

    def close(self) -> None:
        self.told.append(self.name)


def test_the_last_comes_first_and_only_once() -> None:
    told: list[str] = []
    cleanup = Cleanup()
    assert cleanup.own(Thing("first", told)).name == "first"
    cleanup.call(lambda: told.append("second"))
    cleanup.close()
    cleanup.close()
    assert told == ["second", "first"]


def test_what_is_given_while_undoing_is_undone_too() -> None:
    told: list[str] = []
    cleanup = Cleanup()
    cleanup.call(lambda: cleanup.call(lambda: told.append("late")))
    cleanup.close()
    assert told == ["late"]


def test_the_first_of_several_failures_is_the_one_told() -> None:
    cleanup = Cleanup()
    cleanup.call([].pop)
    cleanup.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cleanup.close()


def test_a_failure_spares_nobody_and_is_told() -> None:
    told: list[str] = []
    cleanup = Cleanup()
    cleanup.own(Thing("first", told))
    cleanup.call(lambda: 1 // 0)
    cleanup.own(Thing("last", told))
    with pytest.raises(ZeroDivisionError):
        cleanup.close()
    assert told == ["last", "first"]


def test_the_first_failure_of_several_is_told() -> None:
    cleanup = Cleanup()
    cleanup.call(lambda: int("no number"))
    cleanup.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cleanup.close()
    cleanup.close()

"""The thread of an engine, whatever it serves: this one has nothing to do, and ends at once."""

import os

import pytest

from pileus.virtio.queue._engine import Engine
from tests.unit import tiny


def never(number: int) -> None:
    raise AssertionError(f"it failed with {number}")


def test_it_starts_and_stops_any_number_of_times() -> None:
    before = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
    engine = Engine("_test0_q0", never)
    engine.stop()
    for _ in range(5):
        engine.start()
        assert engine.running
        engine.stop()
        engine.stop()
        assert not engine.running
    engine.start()
    engine.close()
    engine.close()
    tiny.wait_until(lambda: (os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")) == before)


def test_it_does_not_start_twice() -> None:
    engine = Engine("_test0_q0", never)
    engine.start()
    with pytest.raises(RuntimeError, match="_test0_q0"):
        engine.start()
    engine.close()


def test_a_name_longer_than_a_threads_is_cut() -> None:
    engine = Engine("a" * 100, never)
    engine.start()
    engine.close()

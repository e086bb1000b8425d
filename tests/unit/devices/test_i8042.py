from itertools import pairwise

import pytest

from pileus.bus import Bus
from pileus.devices.i8042 import I8042

BASE = 0x60


@pytest.fixture
def resets() -> list[str]:
    return []


@pytest.fixture
def bus(resets: list[str]) -> Bus:
    bus = Bus("ports")
    bus.insert(BASE, 5, I8042(lambda: resets.append("reset")))
    return bus


def test_reads_as_a_controller_that_is_idle(bus: Bus) -> None:
    assert [bus.load(BASE + offset, 1) for offset in range(5)] == [0, 0x20, 0, 0, 0]


def test_pulsing_the_reset_line_resets(bus: Bus, resets: list[str]) -> None:
    bus.store(0x64, 1, 0xFE)
    assert resets == ["reset"]


def test_other_writes_do_nothing(bus: Bus, resets: list[str]) -> None:
    for port in range(0x60, 0x64):
        bus.store(port, 1, 0xFE)
    bus.store(0x64, 1, 0xD1)
    assert resets == []


def test_linux_gives_up_at_once(bus: Bus) -> None:
    """It reads the configuration byte until two in a row agree. Source: i8042_controller_init()."""
    seen = []
    for _ in range(10):
        bus.store(0x64, 1, 0x20)
        assert bus.load(0x64, 1) == 0x01
        seen.append(bus.load(0x60, 1))
        assert bus.load(0x64, 1) == 0x00
    assert all(one != next_ for one, next_ in pairwise(seen))


def test_a_restored_controller_has_its_answer() -> None:
    old, new = I8042(print), I8042(print)
    old.write(4, 1, 0x20)
    new.restore(old.state())
    assert new.read(4, 1) == 1
    assert new.read(0, 1) == old.read(0, 1)

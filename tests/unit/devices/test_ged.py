import os
from collections.abc import Iterator

import pytest

from pileus.bus import Bus
from pileus.devices.ged import POWER_BUTTON, Ged

PORT = 0x506


@pytest.fixture
def call_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def edges(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def on_bus(device: Ged) -> Bus:
    bus = Bus("ports")
    bus.insert(PORT, 1, device)
    return bus


def test_an_event_interrupts_and_is_read_once(call_fd: int) -> None:
    ged = Ged(call_fd)
    bus = on_bus(ged)
    assert (edges(call_fd), bus.load(PORT, 1)) == (0, 0)
    ged.notify(POWER_BUTTON)
    ged.notify(POWER_BUTTON)
    assert edges(call_fd) == 2
    assert (bus.load(PORT, 1), bus.load(PORT, 1)) == (POWER_BUTTON, 0)


def test_a_write_changes_nothing(call_fd: int) -> None:
    ged = Ged(call_fd)
    bus = on_bus(ged)
    ged.notify(POWER_BUTTON)
    bus.store(PORT, 1, 0xFF)
    assert bus.load(PORT, 1) == POWER_BUTTON


def test_an_event_that_waits_is_saved_and_told_again(call_fd: int) -> None:
    ged = Ged(call_fd)
    ged.notify(POWER_BUTTON)
    edges(call_fd)
    again = Ged(call_fd)
    again.restore(ged.state())
    assert edges(call_fd) == 1
    assert on_bus(again).load(PORT, 1) == POWER_BUTTON
    again.restore(again.state())
    assert edges(call_fd) == 0

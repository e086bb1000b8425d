"""virtio-rng, through a driver in memory."""

from collections.abc import Iterator

import pytest

from pileus.testing import F_NEXT, F_WRITE, FakeDriver, Used
from pileus.virtio import status
from pileus.virtio.devices.rng import MAX_REQUEST, REQUESTQ, Rng

BAD_DESCRIPTORS: dict[str, dict[str, int]] = {
    "loops to itself": {"flags": F_NEXT, "next": 0},
    "next outside the table": {"flags": F_NEXT, "next": 999},
    "buffer past the end of ram": {"flags": F_WRITE, "gpa": FakeDriver.RAM_SIZE, "length": 1},
    "for the device to read": {"gpa": 0, "length": 8},
    "empty": {"flags": F_WRITE},
}


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with FakeDriver(Rng("rng0", source=lambda count: b"\xa5" * count)) as driver:
        yield driver


def test_fills_every_buffer_of_a_request(driver: FakeDriver) -> None:
    head = driver.add(writable=[3, 5])
    driver.kick(REQUESTQ)
    assert driver.used() == [Used(head, length=8)]
    assert driver.read(head) == b"\xa5" * 8
    assert driver.interrupts == 1


def test_a_huge_request_gets_a_part(driver: FakeDriver) -> None:
    head = driver.add(writable=[MAX_REQUEST, 5])
    driver.kick(REQUESTQ)
    assert driver.used() == [Used(head, length=MAX_REQUEST)]


@pytest.mark.parametrize("bad", BAD_DESCRIPTORS.values(), ids=list(BAD_DESCRIPTORS))
def test_a_bad_descriptor_stops_the_device(driver: FakeDriver, bad: dict[str, int]) -> None:
    driver.write_descriptor(0, **bad)
    driver.offer(0)
    driver.kick(REQUESTQ)
    assert driver.used() == []
    assert driver.status & status.NEEDS_RESET

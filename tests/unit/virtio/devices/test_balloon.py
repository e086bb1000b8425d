"""virtio-balloon, through a driver in memory: what it takes reads as zeroes."""

import os
from collections.abc import Iterator
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.memory import GuestMemory, Region
from pileus.testing import FakeDriver, Used, make_memory
from pileus.virtio import status
from pileus.virtio.devices.balloon import (
    DEFLATEQ,
    F_DEFLATE_ON_OOM,
    F_REPORTING,
    F_STATS_VQ,
    INFLATEQ,
    MAX_LIST,
    PAGES_PER_KICK,
    Balloon,
    runs,
)

MIB = 1 << 20
PAGE = 4096
STATSQ, REPORTQ = 2, 3
PLAY = 8 * MIB  # pages from here on are nobody's


def full(size: int = 0) -> Balloon:
    return Balloon("balloon0", size, deflate_on_oom=True, free_page_reporting=True, statistics=True)


@pytest.fixture
def balloon() -> Balloon:
    return full(4 * MIB)


@pytest.fixture
def driver(balloon: Balloon) -> Iterator[FakeDriver]:
    with FakeDriver(balloon) as driver:
        yield driver


def pages(*gpas: int) -> bytes:
    return pack(f"<{len(gpas)}I", *(gpa // PAGE for gpa in gpas))


def is_zero(memory: GuestMemory, gpa: int, size: int = PAGE) -> bool:
    return memory.read(gpa, size) == bytes(size)


# -- size -----------------------------------------------------------------------------------------


def test_the_driver_reads_how_many_pages_are_wanted(driver: FakeDriver, balloon: Balloon) -> None:
    assert driver.read_config() == pack("<II", 4 * MIB // PAGE, 0)
    balloon.resize(6 * MIB)
    assert driver.config_interrupts == 1
    assert driver.read_config() == pack("<II", 6 * MIB // PAGE, 0)
    assert balloon.size == 6 * MIB


def test_the_driver_tells_how_many_it_gave(driver: FakeDriver, balloon: Balloon) -> None:
    driver.write_config(4, pack("<I", 256))
    assert balloon.actual == MIB
    assert driver.read_config(4, 4) == pack("<I", 256)
    assert driver.config_interrupts == 0
    driver.write_config(0, pack("<I", 7))  # not the driver's to write
    driver.write_config(5, b"\1")
    driver.write_config(4, b"\1")
    assert (balloon.size, balloon.actual) == (4 * MIB, MIB)
    driver.reset()
    assert balloon.actual == 0


# -- inflate and deflate --------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_inflated_pages_go_and_others_stay(shared: bool) -> None:
    with FakeDriver(full(), shared=shared) as driver:
        driver.memory.write(PLAY, b"\xff" * 8 * PAGE)
        head = driver.add([pages(PLAY + PAGE, PLAY + 2 * PAGE, PLAY + 5 * PAGE)], queue=INFLATEQ)
        driver.kick(INFLATEQ)
        assert driver.used(INFLATEQ) == [Used(head, 0)]
        found = [is_zero(driver.memory, PLAY + index * PAGE) for index in range(8)]
        assert found == [False, True, True, False, False, True, False, False]
        driver.add([pages(PLAY + PAGE)], queue=DEFLATEQ)
        driver.kick(DEFLATEQ)
        driver.memory.write(PLAY + PAGE, b"back")
        assert len(driver.used(DEFLATEQ)) == 1


def test_a_run_may_go_on_in_the_next_region() -> None:
    with make_memory([(0, MIB), (MIB, MIB)]) as memory:
        memory.write(MIB - PAGE, b"\xff" * PAGE)
        memory.write(MIB, b"\xff" * PAGE)
        with FakeDriver(full(), memory=memory, queue_sizes=[8, 8, 8, 8]) as driver:
            driver.add([pages(MIB - PAGE, MIB)], queue=INFLATEQ)
            driver.kick(INFLATEQ)
            assert is_zero(memory, MIB - PAGE)
            assert is_zero(memory, MIB)


BAD_PAGES = [FakeDriver.RAM_SIZE, FakeDriver.HIGH_RAM - PAGE, FakeDriver.HIGH_RAM + FakeDriver.HIGH_RAM_SIZE]


@pytest.mark.parametrize("gpa", [*BAD_PAGES, ((1 << 32) - 1) * PAGE])
def test_a_page_that_is_none_stops_the_device(driver: FakeDriver, gpa: int) -> None:
    driver.add([pages(gpa)], queue=INFLATEQ)
    driver.kick(INFLATEQ)
    assert driver.used(INFLATEQ) == []
    assert driver.status & status.NEEDS_RESET


def test_a_run_into_the_hole_stops_the_device(driver: FakeDriver) -> None:
    driver.add([pages(FakeDriver.RAM_SIZE - PAGE, FakeDriver.RAM_SIZE)], queue=INFLATEQ)
    driver.kick(INFLATEQ)
    assert driver.status & status.NEEDS_RESET


@pytest.mark.parametrize("queue", [INFLATEQ, DEFLATEQ])
def test_a_list_that_is_too_long_stops_the_device(driver: FakeDriver, queue: int) -> None:
    driver.add([bytes(MAX_LIST + 4)], queue=queue)
    driver.kick(queue)
    assert driver.status & status.NEEDS_RESET


@pytest.mark.parametrize("queue", [INFLATEQ, DEFLATEQ, STATSQ])
def test_a_list_for_the_device_to_write_stops_it(driver: FakeDriver, queue: int) -> None:
    driver.add(writable=[16], queue=queue)
    driver.kick(queue)
    assert driver.status & status.NEEDS_RESET


def test_many_lists_are_served_by_and_by(driver: FakeDriver, balloon: Balloon) -> None:
    numbers = pack(f"<{MAX_LIST // 4}I", *([PLAY // PAGE] * (MAX_LIST // 4)))
    for _ in range(5):
        driver.add([numbers], queue=INFLATEQ)
    os.eventfd_write(balloon.queues[INFLATEQ].kick_fd, 1)
    turns = 0
    while driver.rings[INFLATEQ].used_index < 5:
        assert os.eventfd_read(balloon.queues[INFLATEQ].kick_fd) == 1
        balloon.kicked(INFLATEQ)
        turns += 1
        assert driver.rings[INFLATEQ].used_index == turns * PAGES_PER_KICK * 4 // MAX_LIST


@given(st.lists(st.integers(0, 40), max_size=40))
def test_runs_are_the_pages_once_each_in_order(numbers: list[int]) -> None:
    found = runs(numbers)
    assert [page for first, count in found for page in range(first, first + count)] == sorted(set(numbers))
    assert all(found[index][0] + found[index][1] < found[index + 1][0] for index in range(len(found) - 1))


# -- huge pages -----------------------------------------------------------------------------------

HUGE = 8 * PAGE  # a region may say so; its mapping needs not


@pytest.fixture
def huge() -> Iterator[FakeDriver]:
    memory = GuestMemory([(0, Region(-1, MIB)), (2 * MIB, Region(-1, 4 * HUGE, page_size=HUGE))])
    with FakeDriver(full(), memory=memory, queue_sizes=[8, 8, 8, 8]) as driver:
        memory.write(2 * MIB, b"\xff" * 4 * HUGE)
        yield driver
    memory.close()


def test_a_huge_page_goes_when_all_of_it_is_in_the_balloon(huge: FakeDriver) -> None:
    parts = [2 * MIB + HUGE + index * PAGE for index in range(8)]
    huge.add([pages(*parts[:7])], queue=INFLATEQ)
    huge.kick(INFLATEQ)
    assert not is_zero(huge.memory, parts[0])
    huge.add([pages(parts[2])], queue=DEFLATEQ)
    huge.kick(DEFLATEQ)
    huge.add([pages(parts[7])], queue=INFLATEQ)
    huge.kick(INFLATEQ)
    assert not is_zero(huge.memory, parts[0]), "a part of it was taken back"
    huge.add([pages(parts[2])], queue=INFLATEQ)
    huge.kick(INFLATEQ)
    assert is_zero(huge.memory, parts[0], HUGE)
    assert not is_zero(huge.memory, parts[0] - 1, 1)
    assert not is_zero(huge.memory, parts[0] + HUGE, 1)


def test_after_a_reset_parts_are_the_guests_again(huge: FakeDriver) -> None:
    parts = [2 * MIB + index * PAGE for index in range(8)]
    huge.add([pages(*parts[:7])], queue=INFLATEQ)
    huge.kick(INFLATEQ)
    huge.start()
    huge.add([pages(parts[7])], queue=INFLATEQ)
    huge.kick(INFLATEQ)
    assert not is_zero(huge.memory, parts[0])


# -- statistics -----------------------------------------------------------------------------------


def statistics(**values: int) -> bytes:
    tags = {"swap_in": 0, "free_memory": 4, "total_memory": 5, "of_the_future": 99}
    return b"".join(pack("<HQ", tags[name], value) for name, value in values.items())


def test_statistics_come_when_they_are_asked_for(driver: FakeDriver, balloon: Balloon) -> None:
    assert not balloon.request_statistics()
    first = driver.add([statistics(swap_in=1, free_memory=4096, of_the_future=1)], queue=STATSQ)
    driver.kick(STATSQ)
    assert driver.used(STATSQ) == [], "the buffer stays until there is need for another"
    assert balloon.statistics == {"swap_in": 1, "free_memory": 4096}
    assert balloon.request_statistics()
    assert driver.used(STATSQ) == [Used(first, 0)]
    assert driver.calls(STATSQ) == 1
    assert not balloon.request_statistics(), "one is under way"
    driver.add([statistics(total_memory=1 << 40) + b"half"], queue=STATSQ)
    driver.kick(STATSQ)
    assert balloon.statistics == {"total_memory": 1 << 40}


def test_a_driver_that_tells_twice_gets_the_first_back(driver: FakeDriver, balloon: Balloon) -> None:
    first = driver.add([statistics(swap_in=1)], queue=STATSQ)
    driver.add([statistics(swap_in=2)], queue=STATSQ)
    driver.kick(STATSQ)
    assert driver.used(STATSQ) == [Used(first, 0)]
    assert balloon.statistics == {"swap_in": 2}


# -- reporting ------------------------------------------------------------------------------------


def test_reported_pages_go(driver: FakeDriver) -> None:
    driver.memory.write(PLAY, b"\xff" * 4 * PAGE)
    driver.write_descriptor(0, PLAY + PAGE, 2 * PAGE, 2, queue=REPORTQ)
    driver.offer(0, queue=REPORTQ)
    driver.kick(REPORTQ)
    assert driver.used(REPORTQ) == [Used(0, 0)]
    assert [is_zero(driver.memory, PLAY + index * PAGE) for index in range(4)] == [False, True, True, False]


def test_a_report_to_be_read_stops_the_device(driver: FakeDriver) -> None:
    driver.add([b"x"], queue=REPORTQ)
    driver.kick(REPORTQ)
    assert driver.status & status.NEEDS_RESET


def test_without_statistics_reporting_has_their_queue() -> None:
    device = full()
    with FakeDriver(device, features=F_REPORTING, queue_sizes=[8, 8, 8, 0]) as driver:
        driver.memory.write(PLAY, b"\xff" * PAGE)
        driver.write_descriptor(0, PLAY, PAGE, 2, queue=2)
        driver.offer(0, queue=2)
        driver.kick(2)
        assert is_zero(driver.memory, PLAY)


def test_features_are_those_asked_for() -> None:
    for deflate, report, tell in [(True, False, False), (False, True, False), (False, False, True)]:
        device = Balloon("b", 0, deflate_on_oom=deflate, free_page_reporting=report, statistics=tell)
        assert device.features == deflate * F_DEFLATE_ON_OOM | report * F_REPORTING | tell * F_STATS_VQ
        assert len(device.queues) == 2 + report + tell
        device.close()

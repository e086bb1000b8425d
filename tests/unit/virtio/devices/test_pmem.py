"""virtio-pmem, through a driver in memory: a flush is told to be done when it is, and nobody waits for it."""

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.testing import F_NEXT, F_WRITE, FakeDriver
from pileus.virtio import status
from pileus.virtio.devices.pmem import Pmem

GPA, SIZE = 1 << 32, 2 << 20
FLUSH, OTHER = struct.pack("<I", 0), struct.pack("<I", 1)
OK, EIO = struct.pack("<I", 0), struct.pack("<I", 1)


class Disk:
    """What a flush goes to. While ``held``, it takes as long as the test wants."""

    def __init__(self) -> None:
        self.flushes = 0
        self.error: OSError | None = None
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def hold(self) -> None:
        self.go_on.clear()

    def sync(self) -> None:
        self.begun.release()
        assert self.go_on.wait(30)
        self.flushes += 1
        if self.error is not None:
            raise self.error

    def until_it_begins(self) -> None:
        assert self.begun.acquire(timeout=30)


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.go_on.set()


@pytest.fixture
def driver(disk: Disk) -> Iterator[FakeDriver]:
    with FakeDriver(Pmem("pmem0", GPA, SIZE, disk.sync)) as driver:
        yield driver
        disk.go_on.set()


def flush(driver: FakeDriver) -> int:
    head = driver.add([FLUSH], [4])
    driver.kick()
    return head


def test_the_configuration_says_where_the_memory_is(driver: FakeDriver) -> None:
    assert struct.unpack("<QQ", driver.read_config()) == (GPA, SIZE)


def test_a_flush_is_done_when_the_host_has_done_it(driver: FakeDriver, disk: Disk) -> None:
    disk.hold()
    head = flush(driver)
    disk.until_it_begins()
    assert driver.used() == []
    disk.go_on.set()
    (used,) = driver.wait()
    assert (used.head, used.length, driver.read(head)) == (head, 4, OK)
    assert driver.device.counters() == {"flushes": 1}


def test_a_flush_that_fails_is_told(driver: FakeDriver, disk: Disk) -> None:
    disk.error = OSError(errno.ENOSPC, "full")
    head = flush(driver)
    driver.wait()
    assert driver.read(head) == EIO
    disk.error = None
    head = flush(driver)
    driver.wait()
    assert driver.read(head) == OK


def test_a_request_of_another_type_gets_an_error(driver: FakeDriver) -> None:
    head = driver.add([OTHER], [4])
    driver.kick()
    driver.wait()
    assert driver.read(head) == EIO


def test_longer_buffers_are_as_good(driver: FakeDriver) -> None:
    head = driver.add([FLUSH[:1], FLUSH[1:] + b"more"], [1, 7])
    driver.kick()
    (used,) = driver.wait()
    assert used.length == 4
    assert driver.read(head)[:4] == OK


@pytest.mark.parametrize("buffers", [([], [4]), ([FLUSH], []), ([b"abc"], [4]), ([FLUSH], [3])])
def test_a_request_without_type_or_room_for_a_result_stops_the_device(
    driver: FakeDriver, buffers: tuple[list[bytes], list[int]]
) -> None:
    driver.add(*buffers)
    driver.kick()
    assert driver.status & status.NEEDS_RESET
    driver.start()
    flush(driver)
    driver.wait()


def test_one_flush_serves_all_that_wait_for_it(driver: FakeDriver, disk: Disk) -> None:
    disk.hold()
    flush(driver)
    disk.until_it_begins()
    for _ in range(8):
        flush(driver)
    disk.go_on.set()
    assert len(driver.wait(count=9)) == 9
    assert disk.flushes == 2


def test_what_came_during_a_flush_waits_for_another(driver: FakeDriver, disk: Disk) -> None:
    """It may be about data stored after the flush began."""
    disk.hold()
    first = flush(driver)
    disk.until_it_begins()
    second = flush(driver)
    disk.go_on.set()
    assert [used.head for used in driver.wait(count=2)] == [first, second]
    assert disk.flushes == 2


def test_a_reset_waits_for_no_disk_and_is_not_disturbed_by_it(driver: FakeDriver, disk: Disk) -> None:
    disk.hold()
    flush(driver)
    disk.until_it_begins()
    driver.start()
    before = driver.memory.read(0, driver.RAM_SIZE)
    disk.go_on.set()
    until(lambda: disk.flushes == 1)
    assert driver.used() == []
    assert driver.memory.read(0, driver.RAM_SIZE) == before
    head = flush(driver)
    (used,) = driver.wait()
    assert used.head == head


def test_while_paused_nothing_comes_back_and_then_all_does(driver: FakeDriver, disk: Disk) -> None:
    disk.hold()
    heads = [flush(driver)]
    disk.until_it_begins()
    heads.append(flush(driver))
    driver.device.pause()
    before = driver.memory.read(0, driver.RAM_SIZE)
    disk.go_on.set()
    heads.append(flush(driver))
    assert driver.used() == []
    driver.device.pause()
    driver.device.resume()
    assert [used.head for used in driver.wait(count=3)] == heads
    assert driver.memory.read(0, driver.RAM_SIZE) != before


def test_a_flush_under_way_goes_on_elsewhere(driver: FakeDriver, disk: Disk) -> None:
    disk.hold()
    heads = [flush(driver), flush(driver)]
    disk.until_it_begins()
    driver.device.pause()
    state = driver.control.state()
    disk.go_on.set()
    other = Disk()
    driver.move(Pmem("pmem0", GPA, SIZE, other.sync), state)
    assert [used.head for used in driver.wait(count=2)] == heads
    assert other.flushes >= 1


def test_close_waits_for_a_flush_under_way(disk: Disk) -> None:
    """The file is closed next."""
    disk.hold()
    threads = threading.active_count()
    with FakeDriver(Pmem("pmem0", GPA, SIZE, disk.sync)) as driver:
        flush(driver)
        disk.until_it_begins()
        threading.Timer(0.05, disk.go_on.set).start()
    assert disk.flushes == 1
    assert threading.active_count() <= threads + 1  # the timer's


def test_without_a_request_there_is_no_thread(disk: Disk) -> None:
    before = len(os.listdir("/proc/self/task"))
    with FakeDriver(Pmem("pmem0", GPA, SIZE, disk.sync)) as driver:
        driver.kick()
        assert len(os.listdir("/proc/self/task")) == before


requests = st.lists(
    st.tuples(st.lists(st.binary(max_size=8), max_size=3), st.lists(st.integers(0, 8), max_size=3)),
    max_size=12,
)
steps = st.lists(st.sampled_from(["kick", "pause", "resume", "reset", "state"]), max_size=6)


@given(requests, steps)
def test_whatever_the_driver_asks_each_good_request_comes_back_once(
    asked: list[tuple[list[bytes], list[int]]], steps: list[str]
) -> None:
    """Or the device stops at the first bad one. ``used`` looks for what comes twice and at canaries."""
    with FakeDriver(Pmem("pmem0", GPA, SIZE, Disk().sync)) as driver:
        for step in steps:
            if step == "kick":
                driver.kick()
            elif step == "reset":
                driver.start()
            elif step == "state":
                driver.device.pause()
                driver.control.state()
                driver.device.resume()
            else:
                getattr(driver.device, step)()
            flush(driver)
        driver.start()
        driver.device.resume()
        good: list[int] = []
        for readable, writable in asked:
            if not readable and not writable:
                continue
            head = driver.add(readable, writable)
            driver.kick()
            if sum(map(len, readable)) < 4 or sum(writable) < 4:
                assert driver.status & status.NEEDS_RESET
                return
            good.append(head)
            (used,) = driver.wait()
            assert (used.head, used.length) == (head, 4)
        assert not driver.status & status.NEEDS_RESET


def test_descriptors_that_share_their_memory_are_no_danger(driver: FakeDriver) -> None:
    """The result may be written over the type: by then that was read."""
    driver.memory.write(0x800000, FLUSH)
    driver.write_descriptor(0, 0x800000, 4, F_NEXT, 1)
    driver.write_descriptor(1, 0x800000, 4, F_WRITE)
    driver.offer(0)
    driver.kick()
    until(lambda: driver.device.counters()["flushes"] == 1)
    assert driver.memory.read(0x800000, 4) == OK

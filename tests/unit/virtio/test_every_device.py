"""What holds for every device: it lives through a hostile driver, and goes on from a saved state."""

import os
import time
from collections.abc import Iterator

import pytest

from pileus.fs.abi import IN_HEADER, STATFS
from pileus.testing import F_INDIRECT, F_NEXT, F_WRITE, FakeDriver, Used
from pileus.virtio import status
from pileus.virtio.control import Control
from pileus.virtio.device import VirtioDevice
from tests.unit.virtio.factories import FACTORIES, Factory

every_device = pytest.mark.parametrize("factory", FACTORIES.values(), ids=list(FACTORIES))

READY = status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK | status.DRIVER_OK


def busy(driver: FakeDriver) -> None:
    """A chain of either kind on every queue, kicked: right for some devices, wrong for others."""
    for queue, ring in enumerate(driver.rings):
        if driver.device.queues[queue].active:
            for _ in range(min(4, ring.size // 2)):
                driver.add([bytes(16)], queue=queue)
                driver.add(writable=[16], queue=queue)
            driver.kick(queue)


# -- life -----------------------------------------------------------------------------------------


@every_device
def test_nothing_is_left_after_close(factory: Factory) -> None:
    before = os.listdir("/proc/self/fd")
    with factory() as device, FakeDriver(device) as driver:
        busy(driver)
    assert os.listdir("/proc/self/fd") == before


@every_device
def test_a_reset_makes_it_as_new(factory: Factory) -> None:
    with factory() as device, FakeDriver(device) as driver:
        for _ in range(3):
            busy(driver)
            driver.reset()
            assert driver.status == 0
            assert device.memory is None
            assert device.driver_features == 0
            for queue in device.queues:
                assert not queue.active
                assert queue.state() == {
                    "size": queue.max_size,
                    "enabled": False,
                    "descriptors": 0,
                    "available": 0,
                    "used": 0,
                    "next_avail": 0,
                    "next_used": 0,
                }
            driver.start()
            assert driver.status & ~status.NEEDS_RESET == READY


@every_device
def test_kicks_without_a_driver_do_nothing(factory: Factory) -> None:
    with factory() as device, FakeDriver(device, start=False) as driver:
        for index, queue in enumerate(device.queues):
            os.eventfd_write(queue.kick_fd, 1)
            device.kicked(index)
        driver.serve()
        assert driver.status == 0
        assert driver.interrupts == driver.config_interrupts == 0


@every_device
def test_after_a_reset_it_touches_no_memory(factory: Factory) -> None:
    with factory() as device, FakeDriver(device) as driver:
        busy(driver)
        driver.reset()
        before = driver.memory.read(0, driver.RAM_SIZE)
        for index, queue in enumerate(device.queues):
            os.eventfd_write(queue.kick_fd, 1)
            device.kicked(index)
        driver.serve()
        assert driver.memory.read(0, driver.RAM_SIZE) == before


@every_device
def test_while_paused_it_touches_no_memory_and_then_it_goes_on(factory: Factory) -> None:
    with factory() as device, FakeDriver(device) as driver:
        for _ in range(3):
            device.pause()
            busy(driver)
            before = driver.memory.read(0, driver.RAM_SIZE)
            driver.serve()
            assert driver.memory.read(0, driver.RAM_SIZE) == before
            device.resume()
        assert driver.status & ~status.NEEDS_RESET == READY


@every_device
def test_queues_that_stay_disabled_are_left_alone(factory: Factory) -> None:
    with factory() as device:
        none = [0] * len(device.queues)
        with FakeDriver(device, queue_sizes=none) as driver:
            assert driver.status & READY == READY
            for index, queue in enumerate(device.queues):
                os.eventfd_write(queue.kick_fd, 1)
                device.kicked(index)


@every_device
def test_features_that_were_not_offered_are_refused(factory: Factory) -> None:
    with factory() as device, FakeDriver(device, start=False) as driver:
        driver.control.set_status(status.ACKNOWLEDGE | status.DRIVER)
        driver.write_features(driver.offered | 1 << 63)
        driver.control.set_status(READY)
        assert driver.status == status.ACKNOWLEDGE | status.DRIVER
        assert device.driver_features == 0


# -- a hostile driver -----------------------------------------------------------------------------

BAD_DESCRIPTORS: dict[str, dict[str, int]] = {
    "loops to itself": {"flags": F_NEXT, "next": 0},
    "next outside the table": {"flags": F_NEXT, "next": 999},
    "buffer past the end of ram": {"flags": F_WRITE, "gpa": FakeDriver.RAM_SIZE, "length": 1},
    "buffer into the hole": {"gpa": FakeDriver.RAM_SIZE - 1, "length": 2},
    "buffer that wraps": {"gpa": (1 << 64) - 1, "length": 2},
    "buffer of 4 GiB": {"flags": F_WRITE, "length": (1 << 32) - 1},
    "empty indirect table": {"flags": F_INDIRECT},
    "odd indirect table": {"flags": F_INDIRECT, "length": 17},
    "indirect table in the hole": {"flags": F_INDIRECT, "gpa": FakeDriver.RAM_SIZE, "length": 16},
    "indirect table with more": {"flags": F_INDIRECT | F_NEXT, "length": 16},
}


@pytest.fixture(params=FACTORIES.values(), ids=list(FACTORIES))
def driver(request: pytest.FixtureRequest) -> Iterator[FakeDriver]:
    with request.param() as device, FakeDriver(device) as driver:
        device_wants_input(device)
        yield driver


def device_wants_input(device: VirtioDevice) -> None:
    """A device that only writes when the host has something for the guest gets something."""
    if feed := getattr(device, "feed", None):
        feed(b"input")


# Where an IOMMU is in between, these are chains with addresses that are not mapped, and only they fail.
NOT_MAPPED = {
    "buffer past the end of ram",
    "buffer into the hole",
    "buffer that wraps",
    "buffer of 4 GiB",
    "indirect table in the hole",
}

# Queues that are looked at only when the host has something, or not at first
LAZY = {"Net": {0, 2, 3}, "IommuDevice": {1}}
PATIENCE = 10.0


def eager(driver: FakeDriver) -> list[int]:
    """Queues that the device looks at when they are kicked."""
    lazy = LAZY.get(type(driver.device).__name__, set())
    return [index for index in range(len(driver.device.queues)) if index not in lazy]


def until_it_needs_a_reset(driver: FakeDriver) -> None:
    """An engine takes its time."""
    deadline = time.monotonic() + PATIENCE
    while not driver.config_interrupts:
        assert time.monotonic() < deadline, "it takes no notice"
        time.sleep(0.001)


def stopped(driver: FakeDriver, queue: int) -> None:
    """Kick: nothing comes back, the driver is told, and after a reset all is well."""
    driver.config_interrupts = 0
    driver.kick(queue)
    until_it_needs_a_reset(driver)
    assert driver.used(queue) == []
    assert driver.status & status.NEEDS_RESET
    driver.kick(queue)
    assert driver.config_interrupts == 1, "it is told once"
    driver.start()
    assert driver.status == READY


@pytest.mark.parametrize("name", BAD_DESCRIPTORS)
def test_a_bad_descriptor_stops_the_device_until_it_is_reset(driver: FakeDriver, name: str) -> None:
    for queue in eager(driver):
        device_wants_input(driver.device)
        driver.write_descriptor(0, **BAD_DESCRIPTORS[name], queue=queue)
        driver.offer(0, queue)
        if driver.scrambled is None or name not in NOT_MAPPED:
            stopped(driver, queue)
        else:
            driver.kick(queue)
            assert driver.wait(queue) == [Used(0, length=0)]
            assert driver.status == READY
            driver.start()


def test_a_head_outside_the_table_stops_the_device(driver: FakeDriver) -> None:
    for queue in eager(driver):
        device_wants_input(driver.device)
        driver.offer(driver.rings[queue].size, queue)
        stopped(driver, queue)


def test_an_index_that_jumps_stops_the_device(driver: FakeDriver) -> None:
    for queue in eager(driver):
        device_wants_input(driver.device)
        driver.rings[queue].set_available(driver.rings[queue].size + 1)
        stopped(driver, queue)


def test_rings_outside_memory_stop_the_device(driver: FakeDriver) -> None:
    for index in range(len(driver.device.queues)):
        driver.negotiate()
        driver.set_up_queues()
        queue = driver.device.queues[index]
        queue.available = driver.RAM_SIZE
        driver.control.set_status(driver.status | status.DRIVER_OK)
        assert driver.status == READY | status.NEEDS_RESET
        driver.kick(index)
        assert driver.interrupts == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_writes_to_its_configuration_are_harmless(driver: FakeDriver, size: int) -> None:
    for offset in (0, 1, 4, 8, 24, 63, 64, 4096, 1 << 31):
        driver.write_config(offset, b"\xff" * size)
        assert len(driver.read_config(offset, size)) == size
    assert driver.status & READY == READY


# -- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [each for name, each in FACTORIES.items() if not name.startswith("net")])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event-idx", "flags"])
def test_a_saved_device_goes_on_where_it_was(factory: Factory, event_idx: bool) -> None:
    """In the middle of its rings, with chains offered that nobody looked at yet.

    An interface gives nothing back unasked; ``devices/test_net.py`` has a test of its own.
    """
    with factory() as first, FakeDriver(first, event_idx=event_idx) as driver:
        queue, readable, writable = usable_request(driver)
        for _ in range(5):
            driver.add(readable, writable, queue)
            driver.kick(queue)
        came = len(driver.wait(queue, 5))
        for _ in range(2):
            driver.add(readable, writable, queue)
        first.pause()
        state = driver.control.state()
        with factory() as second:
            driver.move(second, state)
            assert driver.status == READY
            assert driver.control.state()["features"] == state["features"]
            came += len(driver.wait(queue, 2))
            driver.add(readable, writable, queue)
            driver.kick(queue)
            came += len(driver.wait(queue, 1))
            assert came == 8
            assert driver.status == READY
            driver.close()


def usable_request(driver: FakeDriver) -> tuple[int, list[bytes], list[int]]:
    """A queue and buffers that this device answers by itself."""
    known: dict[str, tuple[int, list[bytes], list[int]]] = {
        "Rng": (0, [], [16]),
        "ConsoleDevice": (1, [b"words"], []),
        "IommuDevice": (0, [bytes([5]) + bytes(71)], [64, 4]),  # probe endpoint 0, which does not exist
        "Balloon": (0, [bytes([64, 0, 0, 0])], []),
        "Blk": (0, [bytes(16)], [512, 1]),  # read sector 0
        "Pmem": (0, [bytes(4)], [4]),  # flush
        "Fs": (1, [IN_HEADER.pack(IN_HEADER.size, STATFS, 1, 1, 0, 0, 1, 0)], [100]),
    }
    return known[type(driver.device).__name__]


@every_device
def test_a_state_is_plain_and_restores_to_itself(factory: Factory) -> None:
    with factory() as first, FakeDriver(first) as driver:
        busy(driver)
        first.pause()
        state = driver.control.state()
        assert plain(state)
        with factory() as second:
            driver.move(second, state)
            again = driver.control.state()
            for key in ("status", "features", "failed", "config_generation", "device"):
                assert again[key] == state[key], key
            driver.close()


def plain(value: object) -> bool:
    """Made of what any format can carry."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return isinstance(value, int | str | bytes | float | None)


@every_device
def test_a_state_of_another_device_is_refused(factory: Factory) -> None:
    with factory() as device, FakeDriver(device) as driver:
        state = dict(driver.control.state())
        driver.reset()
        control = Control(device, driver.memory)
        with pytest.raises(ValueError, match="queues were saved"):
            control.restore(state | {"queues": state["queues"] * 2})
        with pytest.raises(ValueError, match="no queue is in the state"):
            control.restore(state | {"queues": [{**each, "next_used": 1 << 16} for each in state["queues"]]})
        with pytest.raises(ValueError, match="its driver uses features"):
            control.restore(state | {"features": 1 << 63})

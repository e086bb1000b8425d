"""FakeDriver with a device that gives back what it was given."""

from collections.abc import Iterator

import pytest

from pileus.testing import FakeDriver, Used, make_memory
from pileus.virtio import status
from pileus.virtio.device import VERSION_1, VirtioDevice


class Echo(VirtioDevice):
    """Writes the readable bytes of each chain into its writable ones."""

    id = 42
    queue_sizes = (8, 4)
    features = 1 << 3
    writes = b""

    def handle_queue(self, index: int) -> None:
        for chain in self.queues[index]:
            self.queues[index].push_used(chain, chain.write(chain.read()))

    def write_config(self, offset: int, data: bytes) -> None:
        self.writes += data


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def driver(request: pytest.FixtureRequest) -> Iterator[FakeDriver]:
    with FakeDriver(Echo("echo0"), event_idx=request.param) as driver:
        yield driver


def test_starts_the_device_as_a_driver_does(driver: FakeDriver) -> None:
    assert driver.status == (status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK | status.DRIVER_OK)
    assert driver.device.driver_features == driver.features
    assert driver.features & (VERSION_1 | Echo.features) == VERSION_1 | Echo.features
    assert [queue.active for queue in driver.device.queues] == [True, True]


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("queue", [0, 1])
def test_a_request_comes_back(driver: FakeDriver, queue: int, indirect: bool) -> None:
    head = driver.add([b"some ", b"words"], [3, 9], queue, indirect)
    driver.kick(queue)
    assert driver.used(queue) == [Used(head, 10)]
    assert driver.read(head, queue) == b"some words\0\0"
    assert driver.interrupts == driver.calls(queue) == 1
    assert driver.config_interrupts == 0


def test_rings_go_round(driver: FakeDriver) -> None:
    for number in range(100):
        heads = [driver.add([b"%d" % number], [4]) for _ in range(number % 5)]
        driver.kick_if_wanted()
        assert driver.used() == [Used(head, len(str(number))) for head in heads]


def test_a_kick_is_wanted_for_what_is_new(driver: FakeDriver) -> None:
    assert not driver.rings[0].wants_kick or not driver.rings[0].event_idx
    driver.add(writable=[1])
    assert driver.kick_if_wanted()
    assert len(driver.used()) == 1


def test_waiting_returns_what_came(driver: FakeDriver) -> None:
    heads = [driver.add(writable=[1]) for _ in range(3)]
    driver.kick()
    assert [used.head for used in driver.wait(count=3)] == heads


def test_waiting_in_vain_fails(driver: FakeDriver) -> None:
    with pytest.raises(AssertionError, match="0 of 1"):
        driver.wait(timeout=0.01)


def test_starts_anew_after_a_reset(driver: FakeDriver) -> None:
    driver.add(writable=[1])
    driver.reset()
    assert driver.status == 0
    assert not driver.device.queues[0].active
    driver.start()
    head = driver.add([b"x"], [1])
    driver.kick()
    assert driver.used() == [Used(head, 1)]


def test_features_and_queues_can_be_chosen() -> None:
    with FakeDriver(Echo("echo0"), features=0, queue_sizes=[2, 0]) as driver:
        assert driver.features == VERSION_1
        assert driver.device.queues[0].size == 2
        assert not driver.device.queues[1].active


def test_memory_can_be_the_callers() -> None:
    memory = make_memory([(0, 1 << 20), (1 << 20, 1 << 20)], shared=True)
    with FakeDriver(Echo("echo0"), memory=memory) as driver:
        driver.add([b"a"], [1])
        driver.kick()
        assert len(driver.used()) == 1
    memory.close()


def test_configuration_is_read_and_written(driver: FakeDriver) -> None:
    driver.device.reconfigure(b"\1\2\3")
    assert driver.config_interrupts == 1
    assert driver.read_config() == b"\1\2\3"
    assert driver.read_config(2, 2) == b"\3\0"
    driver.write_config(1, b"\7")
    assert isinstance(driver.device, Echo)
    assert driver.device.writes == b"\7"


def test_a_device_that_writes_past_a_buffer_is_caught(driver: FakeDriver) -> None:
    head = driver.add([b"abc"], [3])
    block = driver.rings[0].blocks(head)[1]
    driver.memory.write(block.gpa + 3, b"!")
    driver.kick()
    with pytest.raises(AssertionError, match="wrote past"):
        driver.used()


def test_all_descriptors_in_flight_is_an_error_of_the_test(driver: FakeDriver) -> None:
    for _ in range(8):
        driver.add(writable=[1])
    with pytest.raises(MemoryError):
        driver.add(writable=[1])

"""The driver-visible side of a device: whatever a driver writes, what it reads back makes sense."""

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pileus.errors import GuestError, HostError
from pileus.testing import FakeDriver, make_memory
from pileus.virtio import status
from pileus.virtio.control import ADDRESSES, WORD, Control
from pileus.virtio.device import VERSION_1, VirtioDevice
from pileus.virtio.queue import RING_FEATURES

RAM = 1 << 20
READY = status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK | status.DRIVER_OK


class Probe(VirtioDevice):
    """Notes whether it is active; refuses to become so if told."""

    id = 42
    features = 1 << 5
    queue_sizes = (16, 4)

    def __init__(self) -> None:
        super().__init__("probe0")
        self.is_active = False
        self.refuses: Exception | None = None

    def activate(self) -> None:
        assert not self.is_active, "activated twice"
        assert self.memory is not None
        self.is_active = True
        if self.refuses is not None:
            raise self.refuses

    def reset(self) -> None:
        assert self.memory is not None
        self.is_active = False

    def handle_queue(self, index: int) -> None:
        assert self.is_active
        for chain in self.queues[index]:
            self.queues[index].push_used(chain)


numbers = st.one_of(st.integers(0, 3), st.integers(0, WORD), st.sampled_from([0x10000, RAM, RAM - 16, WORD]))


class AnyDriver(RuleBasedStateMachine):
    """A driver that writes any register at any time, and in between does things right."""

    @initialize()
    def begin(self) -> None:
        self.memory = make_memory([(0, RAM)])
        self.device = Probe()
        self.control = Control(self.device, self.memory)
        self.told = self.forgotten = 0
        self.control.interrupt = self._tell
        self.control.forget = self._forget

    def _tell(self) -> None:
        self.told += 1

    def _forget(self) -> None:
        self.forgotten += 1

    @rule(value=st.one_of(st.integers(0, 255), st.sampled_from([1, 3, 11, 15, 0, 64, 128])))
    def write_status(self, value: int) -> None:
        before, forgotten = self.control.status, self.forgotten
        self.control.set_status(value)
        after = self.control.status
        if value == 0:
            assert after == 0
            assert self.forgotten == forgotten + 1
        else:
            assert after & before == before, "bits are only added"
            assert after & ~before & ~value & ~status.NEEDS_RESET == 0

    @rule()
    def take_the_next_step(self) -> None:
        for step in (1, 3, 11, 15):
            if self.control.status & 15 < step:
                self.control.set_status(step)
                return

    @rule(select=numbers)
    def select_features(self, select: int) -> None:
        self.control.device_features_select = self.control.driver_features_select = select
        word = self.control.device_features
        assert word == (self.device.offered >> 32 * select & WORD if select < 2 else 0)

    @rule(bits=st.one_of(numbers, st.sampled_from([1, RING_FEATURES])))
    def write_features(self, bits: int) -> None:
        before = self.control.driver_features
        self.control.driver_features = bits
        if self.control.status & status.FEATURES_OK:
            assert self.control.driver_features == before
        elif self.control.driver_features_select < 2:
            assert self.control.driver_features == bits & WORD

    @rule()
    def accept_version_1(self) -> None:
        for select, bits in ((0, 0), (1, VERSION_1 >> 32)):
            self.control.driver_features_select = select
            self.control.driver_features = bits

    @rule(select=st.one_of(st.integers(0, 3), st.sampled_from([0xFFFF, WORD])))
    def select_queue(self, select: int) -> None:
        self.control.queue_select = select
        assert (self.control.queue is None) == (select >= 2)

    @rule(size=numbers)
    def write_queue_size(self, size: int) -> None:
        self.control.set_queue_size(size)

    @rule(which=st.sampled_from(ADDRESSES), high=st.booleans(), value=numbers)
    def write_queue_address(self, which: str, high: bool, value: int) -> None:
        configurable = self.control.configurable()
        before = self.control.queue_address(which, high)
        self.control.set_queue_address(which, high, value)
        assert self.control.queue_address(which, high) == (before if configurable is None else value & WORD)

    @rule(index=st.integers(0, 1))
    def set_up_a_queue_right(self, index: int) -> None:
        self.control.queue_select = index
        self.control.set_queue_size(4)
        for number, which in enumerate(ADDRESSES):
            self.control.set_queue_address(which, False, 0x1000 * (1 + number + 4 * index))
            self.control.set_queue_address(which, True, 0)
        self.control.enable_queue()

    @rule()
    def enable(self) -> None:
        self.control.enable_queue()

    @rule()
    def disable(self) -> None:
        self.control.disable_queue()

    @rule(index=st.integers(0, 1))
    def kick(self, index: int) -> None:
        os.eventfd_write(self.device.queues[index].kick_fd, 1)
        self.device.kicked(index)

    @rule()
    def break_a_rule(self) -> None:
        told = self.told
        self.device.fail("a driver broke a rule")
        assert self.told == told + bool(self.control.status & status.DRIVER_OK)

    @rule(text=st.binary(max_size=8))
    def reconfigure(self, text: bytes) -> None:
        told, generation = self.told, self.device.config_generation
        self.device.reconfigure(text)
        assert self.told == told + bool(self.control.status & status.DRIVER_OK)
        assert self.device.config_generation == generation + 1

    @rule()
    def save_and_restore(self) -> None:
        state = self.control.state()
        other = Probe()
        control = Control(other, self.memory)
        control.restore(state)
        assert control.state() == state
        assert other.is_active == (self.device.is_active and not self.device.failed)
        control.reset()
        other.close()

    @invariant()
    def the_status_is_one_of_the_specification(self) -> None:
        now = self.control.status
        for bit, before in status.NEEDS.items():
            assert not now & bit or now & before == before
        if now & status.DRIVER_OK and not now & status.NEEDS_RESET:
            assert self.device.is_active
        if not now & status.DRIVER_OK:
            assert not self.device.is_active
            assert not any(queue.active for queue in self.device.queues)

    @invariant()
    def negotiated_features_were_offered(self) -> None:
        features = self.device.driver_features
        assert features & ~self.device.offered == 0
        if self.control.status & status.FEATURES_OK:
            assert features & VERSION_1
        else:
            assert features == 0

    @invariant()
    def active_queues_are_possible(self) -> None:
        for queue in self.device.queues:
            if queue.active:
                assert queue.enabled
                assert queue.size in {1, 2, 4, 8, 16}
                assert queue.size <= queue.max_size
                assert max(queue.descriptors, queue.available, queue.used) < RAM

    def teardown(self) -> None:
        if hasattr(self, "control"):
            self.control.reset()
            self.device.close()
            self.memory.close()


AnyDriver.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAnyDriver = AnyDriver.TestCase


@pytest.mark.parametrize("reason", [GuestError("the driver is mad"), HostError("start", "a thread", "no")])
def test_a_device_that_cannot_become_active_asks_for_a_reset(reason: Exception) -> None:
    device = Probe()
    device.refuses = reason
    with FakeDriver(device) as driver:
        assert driver.status == READY | status.NEEDS_RESET
        assert driver.config_interrupts == 1
        driver.kick()
        device.refuses = None
        driver.start()
        assert driver.status == READY


def test_what_was_served_before_an_error_is_told_of() -> None:
    class Picky(Probe):
        def handle_queue(self, index: int) -> None:
            for chain in self.queues[index]:
                if not chain.readable_len:
                    raise GuestError("a request without a word")
                self.queues[index].push_used(chain)

    with FakeDriver(Picky()) as driver:
        head = driver.add([b"x"])
        driver.add(writable=[1])
        driver.add([b"x"])
        driver.kick()
        assert [used.head for used in driver.used()] == [head]
        assert driver.interrupts == 1
        assert driver.status & status.NEEDS_RESET


def test_chains_offered_before_driver_ok_are_served() -> None:
    with FakeDriver(Probe(), start=False) as driver:
        driver.negotiate()
        driver.set_up_queues()
        head = driver.add([b"early"])
        driver.control.set_status(READY)
        driver.serve()
        assert [used.head for used in driver.used()] == [head]


def test_a_failure_on_another_thread_is_not_lost_to_a_write_of_the_status() -> None:
    with FakeDriver(Probe()) as driver:
        driver.device.fail("its engine has ended")
        driver.control.set_status(READY)
        assert driver.status == READY | status.NEEDS_RESET


def test_who_asked_hears_of_each_activation_and_reset_by_the_driver() -> None:
    memory = make_memory([(0, RAM)])
    device = Probe()
    heard: list[str] = []
    device.noticed = heard.append
    control = Control(device, memory)
    control.set_status(0)
    assert heard == []
    for _ in range(2):
        control.set_status(status.ACKNOWLEDGE)
        control.driver_features_select = 1
        control.driver_features = VERSION_1 >> 32
        control.set_status(READY & ~status.DRIVER_OK)
        control.set_status(READY)
        control.set_status(0)
    assert heard == ["activated", "reset"] * 2
    device.refuses = GuestError("no")
    control.driver_features_select = 1
    control.driver_features = VERSION_1 >> 32
    control.set_status(READY & ~status.DRIVER_OK)
    control.set_status(READY)
    assert heard == ["activated", "reset"] * 2, "one that cannot is not active"
    control.reset()
    device.close()
    memory.close()

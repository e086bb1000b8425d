"""virtio-mmio as a driver sees it: registers, resets, interrupts and hostile accesses."""

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.bus import Bus
from pileus.memory import GuestMemory
from pileus.memory._space import Region
from pileus.virtio import status
from pileus.virtio.device import VERSION_1
from pileus.virtio.devices.rng import Rng
from pileus.virtio.mmio import MmioTransport
from pileus.virtio.queue import RING_FEATURES

RAM = 1 << 20
DESCRIPTORS, AVAILABLE, USED, DATA = 0x1000, 0x2000, 0x3000, 0x4000
READY = status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK | status.DRIVER_OK
F_WRITE = 2


class Machine:
    """A driver's view of one rng device on a bus of its own."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(0, Region(-1, RAM))])
        self.device = Rng("rng0", lambda count: b"\xa5" * count)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.transport = MmioTransport(self.device, self.memory, self.call_fd)
        self.bus = Bus("mmio")
        self.bus.insert(0, 0x1000, self.transport)

    def close(self) -> None:
        self.transport.control.reset()
        self.device.close()
        os.close(self.call_fd)
        self.memory.close()

    def get(self, offset: int) -> int:
        return self.bus.load(offset, 4)

    def put(self, offset: int, value: int) -> None:
        self.bus.store(offset, 4, value)

    def negotiate(self, features: int = VERSION_1) -> None:
        self.put(0x070, 0)
        self.put(0x070, status.ACKNOWLEDGE)
        self.put(0x070, status.ACKNOWLEDGE | status.DRIVER)
        for select in (0, 1):
            self.put(0x024, select)
            self.put(0x020, features >> 32 * select & 0xFFFFFFFF)
        self.put(0x070, READY & ~status.DRIVER_OK)

    def set_up_queue(self, size: int = 8, descriptors: int = DESCRIPTORS) -> None:
        self.put(0x030, 0)
        self.put(0x038, size)
        for offset, gpa in ((0x080, descriptors), (0x090, AVAILABLE), (0x0A0, USED)):
            self.put(offset, gpa & 0xFFFFFFFF)
            self.put(offset + 4, gpa >> 32)
        self.put(0x044, 1)

    def start(self) -> None:
        self.negotiate()
        self.set_up_queue()
        self.put(0x070, READY)

    def offer(self, length: int) -> None:
        self.memory.write(DESCRIPTORS, struct.pack("<QIHH", DATA, length, F_WRITE, 0))
        self.memory.write(AVAILABLE, struct.pack("<HHH", 0, 1, 0))

    def interrupted(self) -> bool:
        try:
            return os.eventfd_read(self.call_fd) > 0
        except BlockingIOError:
            return False


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def test_it_says_what_it_is(machine: Machine) -> None:
    assert struct.pack("<I", machine.get(0x000)) == b"virt"
    assert machine.get(0x004) == 2
    assert machine.get(0x008) == 4


def test_features_are_offered_in_two_halves_and_nothing_beyond(machine: Machine) -> None:
    halves = []
    for select in (0, 1, 2, 0xFFFFFFFF):
        machine.put(0x014, select)
        halves.append(machine.get(0x010))
    assert halves == [RING_FEATURES & 0xFFFFFFFF, 1, 0, 0]


def test_a_request_is_served_and_the_driver_interrupted(machine: Machine) -> None:
    machine.start()
    assert machine.get(0x070) == READY
    machine.offer(16)
    machine.put(0x050, 0)
    assert os.eventfd_read(machine.device.queues[0].kick_fd)
    machine.device.kicked(0)
    assert machine.memory.read(DATA, 17) == b"\xa5" * 16 + b"\0"
    assert struct.unpack("<HHII", machine.memory.read(USED, 12))[1:] == (1, 0, 16)
    assert machine.interrupted()
    assert machine.get(0x060) & 1


def test_features_that_were_not_offered_are_refused(machine: Machine) -> None:
    for features in (VERSION_1 | 1, 0, VERSION_1 | 1 << 63):
        machine.negotiate(features)
        assert not machine.get(0x070) & status.FEATURES_OK, hex(features)
        machine.put(0x070, READY)
        assert not machine.get(0x070) & status.DRIVER_OK


def test_accepted_features_can_be_changed_back_before_features_ok(machine: Machine) -> None:
    machine.put(0x070, 3)
    machine.put(0x020, 0xFFFFFFFF)
    machine.put(0x020, 0)
    machine.put(0x024, 1)
    machine.put(0x020, 1)
    machine.put(0x070, READY & ~status.DRIVER_OK)
    assert machine.get(0x070) & status.FEATURES_OK


@pytest.mark.parametrize(
    ("size", "descriptors"), [(7, DESCRIPTORS), (512, DESCRIPTORS), (8, 0x1008), (8, RAM)]
)
def test_bad_rings_need_a_reset_after_which_good_ones_work(
    machine: Machine, size: int, descriptors: int
) -> None:
    machine.negotiate()
    machine.set_up_queue(size, descriptors)
    machine.put(0x070, READY)
    assert machine.get(0x070) & status.NEEDS_RESET
    machine.start()
    assert machine.get(0x070) == READY


def test_a_reset_forgets_queues_features_and_news(machine: Machine) -> None:
    machine.start()
    machine.device.reconfigure(b"new")
    assert machine.get(0x060) == 3
    assert machine.get(0x0FC) == 1
    machine.put(0x070, 0)
    assert (machine.get(0x070), machine.get(0x044), machine.get(0x060)) == (0, 0, 1)
    machine.offer(16)
    machine.device.kicked(0)
    assert machine.memory.read(DATA, 16) == bytes(16)


def test_a_change_of_configuration_is_news_until_it_is_acknowledged(machine: Machine) -> None:
    machine.start()
    machine.device.reconfigure(b"\x01\x02\x03")
    assert machine.interrupted()
    assert machine.bus.load(0x100, 2) == 0x0201
    assert machine.bus.load(0x102, 8) == 3
    machine.put(0x064, 2)
    assert machine.get(0x060) == 1


def test_a_device_that_was_not_started_tells_nobody(machine: Machine) -> None:
    machine.device.reconfigure(b"\x01")
    assert not machine.interrupted()


def test_queues_that_do_not_exist_have_no_size(machine: Machine) -> None:
    machine.put(0x030, 1)
    assert machine.get(0x034) == 0
    machine.put(0x044, 1)
    assert machine.get(0x044) == 0
    machine.put(0x050, 0xFFFF)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*range(0, 0x110, 2), 0xFFC]),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 15), st.none()),
        ),
        max_size=30,
    )
)
def test_any_accesses_leave_a_device_that_starts(accesses: "list[tuple[int, int, int | None]]") -> None:
    machine = Machine()
    try:
        for offset, size, value in accesses:
            if value is None:
                machine.bus.load(offset, size)
            else:
                machine.bus.store(offset, size, value & (1 << 8 * size) - 1)
        machine.start()
        assert machine.get(0x070) == READY
    finally:
        machine.close()

"""A virtio device on PCI, as a driver finds it, sets it up, and may try to break it."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.bus import Bus
from pileus.errors import KvmError
from pileus.memory import GuestMemory, Region
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus
from pileus.virtio import ids
from pileus.virtio.device import VERSION_1, VirtioDevice
from pileus.virtio.pci import CONFIG, NOTIFY, PBA, TABLE, PciTransport
from tests.unit.pci.conftest import FakeRoutes

BASE = 0x10_0000_0000
BLOCK_BASE = 0xC0000000
SLOT = 1
DEVFN = SLOT << 3
ADDRESS, DATA = 0xFEE00000, 0x41
# Common configuration.
DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0x0, 0x4, 0x8, 0xC
CONFIG_VECTOR, NUM_QUEUES, STATUS, GENERATION = 0x10, 0x12, 0x14, 0x15
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, NOTIFY_OFF, QUEUE_DESC = (
    0x16,
    0x18,
    0x1A,
    0x1C,
    0x1E,
    0x20,
)
ISR = 0x100
NO_VECTOR = 0xFFFF


class Device(VirtioDevice):
    """Two queues and eight bytes of configuration, four of which a driver may write."""

    id = ids.NET
    queue_sizes: tuple[int, ...] = (256, 64)

    def __init__(self) -> None:
        super().__init__("net0")
        self.config = b"\1\2\3\4\5\6\7\x08"
        self.activations = 0

    def activate(self) -> None:
        self.activations += 1

    def write_config(self, offset: int, data: bytes) -> None:
        if offset < 4:
            self.config = (self.config[:offset] + data + self.config[offset + len(data) :])[:8]


class Disk(Device):
    id = ids.BLOCK


class Doorbells:
    """Stands for the ioeventfds of a VM."""

    def __init__(self, room: int = 1000) -> None:
        self.rings: dict[int, int] = {}  # gpa -> fd
        self._room = room

    def add_ioeventfd(self, fd: int, address: int, size: int, value: int | None = None) -> None:
        if len(self.rings) == self._room:
            raise KvmError("KVM_IOEVENTFD", 28)
        assert (size, value) == (0, None)
        assert address not in self.rings
        self.rings[address] = fd

    def remove_ioeventfd(self, fd: int, address: int, size: int, value: int | None = None) -> None:
        assert self.rings.pop(address) == fd


class Driver:
    """Reaches the device by configuration space and memory alone."""

    def __init__(self, device: VirtioDevice, doorbells: Doorbells | None = None) -> None:
        fd = os.memfd_create("ram")
        os.ftruncate(fd, 1 << 20)
        self.memory = GuestMemory([(0, Region(fd, 1 << 20))])
        self.mmio = Bus("mmio")
        self.routes = FakeRoutes()
        self.doorbells = doorbells or Doorbells()
        self.bus = PciBus(self.mmio, Window(BLOCK_BASE, 1 << 24), Window(BASE, 1 << 24))
        self.device = device
        self.transport = PciTransport(device, self.memory, self.routes, self.doorbells)
        self.bus.add(self.transport, SLOT)
        self.base = BASE if device.id != ids.BLOCK else BLOCK_BASE

    def close(self) -> None:
        self.transport.close()
        self.device.close()
        self.memory.close()

    def config(self, register: int, size: int = 4) -> int:
        return self.bus.read(DEVFN, register, size)

    def set_config(self, register: int, size: int, value: int) -> None:
        self.bus.write(DEVFN, register, size, value)

    def enable(self) -> None:
        self.set_config(4, 2, 6)

    def load(self, offset: int, size: int) -> int:
        return self.mmio.load(self.base + offset, size)

    def store(self, offset: int, size: int, value: int) -> None:
        self.mmio.store(self.base + offset, size, value)

    def capabilities(self) -> list[tuple[int, int, int]]:
        """(id, type of a virtio one, offset) of each."""
        found, at = [], self.config(0x34, 1)
        while at:
            found.append((self.config(at, 1), self.config(at + 3, 1), at))
            at = self.config(at + 1, 1)
        return found

    def capability(self, kind: int) -> int:
        return next(at for identifier, each, at in self.capabilities() if (identifier, each) == (9, kind))

    def accept(self, features: int) -> int:
        """Negotiate; returns the status that came of it."""
        for status in (1, 3):
            self.store(STATUS, 1, status)
        for select in (0, 1):
            self.store(DRIVER_FEATURE_SELECT, 4, select)
            self.store(DRIVER_FEATURE, 4, features >> (32 * select) & 0xFFFFFFFF)
        self.store(STATUS, 1, 11)
        return self.load(STATUS, 1)

    def start(self) -> None:
        """Both queues, vector 0 for the configuration, 1 and 2 for them; all unmasked."""
        self.enable()
        self.unmask()
        assert self.accept(VERSION_1) == 11
        self.store(CONFIG_VECTOR, 2, 0)
        for index in range(2):
            self.store(QUEUE_SELECT, 2, index)
            self.store(QUEUE_VECTOR, 2, index + 1)
            for which in range(3):
                self.store(QUEUE_DESC + 8 * which, 8, 0x1000 * (1 + index * 8 + which * 2))
            self.store(QUEUE_ENABLE, 2, 1)
        self.store(STATUS, 1, 15)

    def unmask(self) -> None:
        at = next(at for identifier, _, at in self.capabilities() if identifier == 0x11)
        self.set_config(at + 2, 2, 0x8000)
        for index in range(3):
            for word, value in enumerate((ADDRESS, 0, DATA + index, 0)):
                self.store(TABLE + 16 * index + 4 * word, 4, value)


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver(Device())
    driver.enable()
    yield driver
    driver.close()


def kicked(device: VirtioDevice, index: int) -> bool:
    try:
        return os.eventfd_read(device.queues[index].kick_fd) > 0
    except BlockingIOError:
        return False


@pytest.mark.parametrize(
    ("device", "number", "code"),
    [(Device, 0x1041, 0x020000), (Disk, 0x1042, 0x018000)],
    ids=["net", "block"],
)
def test_ids_say_what_it_is(device: type[Device], number: int, code: int) -> None:
    driver = Driver(device())
    assert driver.config(0) == number << 16 | 0x1AF4
    assert driver.config(8) == code << 8 | 1
    assert driver.config(0x2C) == number << 16 | 0x1AF4
    assert driver.config(0x3D, 1) == 0  # no interrupt pin
    assert driver.config(0x10) == (4 if device is Device else BLOCK_BASE)
    driver.close()


def test_capabilities_lead_to_the_registers(driver: Driver) -> None:
    assert [(identifier, kind) for identifier, kind, _ in driver.capabilities()] == [
        (9, 1),
        (9, 3),
        (9, 4),
        (9, 2),
        (9, 5),
        (0x11, 0),
    ]
    for kind, offset, length in [(1, 0, 56), (3, ISR, 1), (4, CONFIG, 4096), (2, NOTIFY, 8)]:
        at = driver.capability(kind)
        assert (driver.config(at + 4, 1), driver.config(at + 8), driver.config(at + 12)) == (
            0,
            offset,
            length,
        )
    assert driver.config(driver.capability(2) + 2, 1) == 20
    assert driver.config(driver.capability(2) + 16) == 4  # notify_off_multiplier
    at = driver.capabilities()[-1][2]
    assert (driver.config(at + 2, 2), driver.config(at + 4), driver.config(at + 8)) == (2, TABLE, PBA)


def test_after_reset_there_are_no_vectors_and_full_queues(driver: Driver) -> None:
    assert driver.load(NUM_QUEUES, 2) == 2
    assert driver.load(CONFIG_VECTOR, 2) == NO_VECTOR
    for index, size in enumerate((256, 64)):
        driver.store(QUEUE_SELECT, 2, index)
        values = [driver.load(at, 2) for at in (QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, NOTIFY_OFF)]
        assert values == [size, NO_VECTOR, 0, index]


def test_a_queue_that_does_not_exist_reads_as_zero(driver: Driver) -> None:
    driver.store(QUEUE_SELECT, 2, 2)
    driver.store(QUEUE_VECTOR, 2, 0)
    assert [driver.load(at, 2) for at in (QUEUE_SIZE, QUEUE_ENABLE, NOTIFY_OFF)] == [0, 0, 0]
    assert driver.load(QUEUE_VECTOR, 2) == NO_VECTOR
    assert driver.load(QUEUE_DESC, 8) == 0


def test_a_vector_beyond_the_table_reads_back_as_none(driver: Driver) -> None:
    for number, kept in [(2, 2), (3, NO_VECTOR), (0, 0), (NO_VECTOR, NO_VECTOR)]:
        driver.store(CONFIG_VECTOR, 2, number)
        driver.store(QUEUE_VECTOR, 2, number)
        assert (driver.load(CONFIG_VECTOR, 2), driver.load(QUEUE_VECTOR, 2)) == (kept, kept)
    assert driver.device.queues[0].call_fd == -1


def test_features_come_in_two_words(driver: Driver) -> None:
    words = []
    for select in range(3):
        driver.store(DEVICE_FEATURE_SELECT, 4, select)
        words.append(driver.load(DEVICE_FEATURE, 4))
    assert words[0] | words[1] << 32 == driver.device.offered
    assert words[2] == 0
    assert driver.accept(VERSION_1 | 1 << 5) == 3
    driver.store(STATUS, 1, 0)
    assert driver.load(STATUS, 1) == 0
    assert driver.accept(VERSION_1) == 11


def test_a_started_device_interrupts_by_the_vectors_of_its_queues(driver: Driver) -> None:
    driver.start()
    device = driver.device
    assert driver.load(STATUS, 1) == 15
    assert device.activations == 1  # type: ignore[attr-defined]
    assert [queue.active for queue in device.queues] == [True, True]
    for index, queue in enumerate(device.queues):
        os.eventfd_write(queue.call_fd, 1)
        assert driver.routes.delivered() == [(ADDRESS, DATA + 1 + index)]


def test_a_new_configuration_interrupts_and_shows_in_the_isr_once(driver: Driver) -> None:
    driver.start()
    assert driver.load(ISR, 1) == 1
    driver.device.reconfigure(b"\x99" * 8)
    assert driver.routes.delivered() == [(ADDRESS, DATA)]
    assert driver.load(GENERATION, 1) == 1
    assert driver.load(CONFIG, 4) == 0x99999999
    assert [driver.load(ISR, 1), driver.load(ISR, 1)] == [3, 1]


def test_a_reset_forgets_vectors_queues_and_news(driver: Driver) -> None:
    driver.start()
    driver.device.reconfigure(b"")
    driver.store(STATUS, 1, 0)
    assert driver.load(STATUS, 1) == 0
    assert driver.load(CONFIG_VECTOR, 2) == NO_VECTOR
    assert driver.load(ISR, 1) == 1
    assert [queue.call_fd for queue in driver.device.queues] == [-1, -1]
    driver.start()
    assert driver.device.activations == 2  # type: ignore[attr-defined]


def test_configuration_is_read_and_written_in_any_width(driver: Driver) -> None:
    assert [driver.load(CONFIG + at, size) for at, size in ((0, 1), (2, 2), (4, 4), (0, 8))] == [
        1,
        0x0403,
        0x08070605,
        0x0807060504030201,
    ]
    assert driver.load(CONFIG + 6, 4) == 0x0807  # what is beyond is zero
    driver.store(CONFIG + 1, 2, 0xBBAA)
    assert driver.load(CONFIG, 4) == 0x04BBAA01


def test_doorbells_move_with_the_bar(driver: Driver) -> None:
    fds = [queue.kick_fd for queue in driver.device.queues]
    rings = driver.doorbells.rings
    assert rings == {BASE + NOTIFY: fds[0], BASE + NOTIFY + 4: fds[1]}
    driver.set_config(0x10, 4, 0x80000)
    assert rings == {BASE + 0x80000 + NOTIFY: fds[0], BASE + 0x80000 + NOTIFY + 4: fds[1]}
    driver.set_config(4, 2, 0)
    assert rings == {}


def test_a_kick_that_reaches_the_bus_is_one_too(driver: Driver) -> None:
    driver.store(NOTIFY + 4, 2, 1)
    assert [kicked(driver.device, index) for index in range(2)] == [False, True]
    driver.store(NOTIFY + 8, 2, 1)  # no such queue
    driver.store(NOTIFY + 1, 1, 7)
    assert [kicked(driver.device, index) for index in range(2)] == [True, False]


def test_without_room_for_a_doorbell_the_bus_rings() -> None:
    driver = Driver(Device(), Doorbells(room=1))
    driver.enable()
    assert list(driver.doorbells.rings) == [BASE + NOTIFY]
    driver.store(NOTIFY + 4, 2, 1)
    assert kicked(driver.device, 1)
    driver.close()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_window_in_configuration_space_reaches_the_bar(enabled: bool) -> None:
    """Firmware uses it before it gives the BAR an address."""
    driver = Driver(Device())
    if enabled:
        driver.enable()
    at = driver.capability(5)

    def aim(offset: int, size: int, bar: int = 0) -> None:
        driver.set_config(at + 4, 1, bar)
        driver.set_config(at + 8, 4, offset)
        driver.set_config(at + 12, 4, size)

    aim(NUM_QUEUES, 2)
    assert driver.config(at + 16, 2) == 2
    aim(QUEUE_SELECT, 2)
    driver.set_config(at + 16, 4, 1)
    aim(NOTIFY_OFF, 2)
    assert driver.config(at + 16, 2) == 1
    aim(NOTIFY, 2)
    driver.set_config(at + 16, 2, 0)
    assert kicked(driver.device, 0)
    before = driver.config(at + 16)
    for offset, size, bar in [(NOTIFY, 3, 0), (0, 0, 0), (1, 4, 0), (0, 4, 1), (0, 8, 0)]:
        aim(offset, size, bar)
        assert driver.config(at + 16) == before
    aim(0xFFFFFFFC, 4)
    driver.set_config(at + 16, 4, 0)
    assert driver.config(at + 16) == 0xFFFFFFFF
    driver.close()


def test_a_state_goes_on_where_it_stopped(driver: Driver) -> None:
    driver.start()
    driver.set_config(0x10, 4, 0x40000)
    driver.device.reconfigure(b"12345678")
    driver.routes.delivered()
    state = driver.transport.state()
    other = Driver(Device())
    other.transport.restore(state)
    other.bus.decode(other.transport)
    other.base = BASE + 0x40000
    assert other.transport.state() == state
    assert other.load(STATUS, 1) == 15
    assert list(other.doorbells.rings) == [BASE + 0x40000 + NOTIFY, BASE + 0x40000 + NOTIFY + 4]
    assert other.load(ISR, 1) == 3
    os.eventfd_write(other.device.queues[1].call_fd, 1)
    assert other.routes.delivered() == [(ADDRESS, DATA + 2)]
    other.close()


def test_a_state_of_another_device_is_refused(driver: Driver) -> None:
    class OneQueue(Device):
        queue_sizes = (256,)

    other = Driver(OneQueue())
    with pytest.raises(ValueError, match="not a state of this function"):
        other.transport.restore(driver.transport.state())
    other.close()


def test_closing_gives_everything_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    driver = Driver(Device())
    driver.start()
    driver.close()
    assert (driver.routes.attached, driver.routes.given, driver.doorbells.rings) == ({}, set(), {})
    assert len(os.listdir("/proc/self/fd")) == before


REGISTERS = st.one_of(
    st.integers(0, 0x38), st.sampled_from([ISR, PBA, CONFIG, NOTIFY, TABLE]), st.integers(0, 0x4010)
)


@given(
    st.lists(
        st.tuples(REGISTERS, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1), st.booleans()),
        max_size=60,
    ),
    st.booleans(),
)
def test_no_access_to_the_bar_fails(accesses: list[tuple[int, int, int, bool]], started: bool) -> None:
    driver = Driver(Device())
    driver.enable()
    if started:
        driver.start()
    for offset, size, value, write in accesses:
        if write:
            driver.store(offset, size, value & (1 << (8 * size)) - 1)
        assert 0 <= driver.load(offset, size) < 1 << (8 * size)
    assert driver.load(NUM_QUEUES, 2) == 2
    driver.store(STATUS, 1, 0)
    assert driver.load(STATUS, 1) == 0
    driver.close()


@given(
    st.lists(
        st.tuples(st.integers(0, 260), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)), max_size=60
    )
)
def test_no_access_to_configuration_space_fails(writes: list[tuple[int, int, int]]) -> None:
    driver = Driver(Device())
    for register, size, value in writes:
        driver.set_config(register, size, value & (1 << (8 * size)) - 1)
        driver.config(register, size)
    assert driver.config(0) == 0x10411AF4
    assert len(driver.capabilities()) == 6
    driver.close()

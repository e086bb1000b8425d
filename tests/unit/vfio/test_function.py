"""A device that passes through, as a driver in the guest finds it and sets it up."""

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.bus import Bus
from pileus.errors import ConfigError
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus
from pileus.vfio import abi
from pileus.vfio.function import PassThrough
from tests.unit.pci.conftest import FakeRoutes

from .conftest import FakeBackend, FakeVm

LOW, HIGH = 0xC0000000, 0x10_0000_0000
ONES = 0xFFFFFFFF
COMMAND, BAR0, BAR2, ROM = 0x04, 0x10, 0x18, 0x30
GSI = 17
PM, MSI, EXPRESS, MSIX, ADVANCED = 0x40, 0x50, 0x70, 0xB0, 0xC0
ADDRESS, DATA = 0xFEE01000, 0x4031
TABLE_BAR_SIZE = 0x4000


def config_of_a_device(**more: int) -> bytearray:
    """A 64-bit BAR 0 and a 32-bit BAR 2, and one of each capability."""
    config = bytearray(256)
    struct.pack_into("<HHHHI", config, 0, 0x8086, 0x1234, 0x0007, 0x0810, 0x01080201)
    struct.pack_into("<IIIIII", config, BAR0, 0xFE000004, 0, 0xFD000008, 0x0000E001, 0, 0)
    struct.pack_into("<HH", config, 0x2C, 0x8086, 0x5678)
    config[0x34], config[0x3C], config[0x3D] = PM, 11, 1
    struct.pack_into("<BBHHH", config, PM, 0x01, MSI, 0x0003, 0x0100, 0)
    struct.pack_into("<BBH", config, MSI, 0x05, EXPRESS, 0x0186 | 1)  # 8 vectors, 64 bits, masks; enabled
    struct.pack_into("<BBHIHH", config, EXPRESS, 0x10, MSIX, 0x0002, 1 << 28, 0x2810, 0)
    struct.pack_into("<I", config, EXPRESS + 0x0C, 0x00477D02)
    struct.pack_into("<BBHII", config, MSIX, 0x11, ADVANCED, 0x8003, 0x2000, 0x3000)
    struct.pack_into("<BBBBBB", config, ADVANCED, 0x13, 0x14, 6, 3, 0, 0)
    return config


SIZES = {0: TABLE_BAR_SIZE, 2: 0x1000, 3: 0x100, abi.ROM: 0x1000, abi.CONFIG: 256}
IRQS = {abi.INTX: 1, abi.MSI: 8, abi.MSIX: 4, abi.ERR: 1, abi.REQ: 1}


class Machine:
    """A bus with the device in slot 1."""

    def __init__(self, backend: FakeBackend, vm: FakeVm, routes: FakeRoutes) -> None:
        self.backend, self.vm, self.routes = backend, vm, routes
        self.mmio = Bus("mmio")
        self.bus = PciBus(self.mmio, Window(LOW, 0x1000_0000), Window(HIGH, 0x1000_0000))
        self.function = PassThrough(backend, routes, vm, vm, vm, GSI)
        self.slot = self.bus.add(self.function, slot=1)
        self.function.placed(lambda: self.bus.decode(self.function))

    def read(self, register: int, size: int = 4) -> int:
        return self.bus.read(8, register, size)

    def write(self, register: int, size: int, value: int) -> None:
        self.bus.write(8, register, size, value)

    def capabilities(self) -> list[int]:
        found, at = [], self.read(0x34, 1)
        while at:
            found.append(self.read(at, 1))
            at = self.read(at + 1, 1)
        return found


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend(config_of_a_device(), SIZES, IRQS)
    backend.regions[0].areas = [(0, TABLE_BAR_SIZE)]
    return backend


@pytest.fixture
def machine(backend: FakeBackend, vm: FakeVm, routes: FakeRoutes) -> Iterator[Machine]:
    before = len(os.listdir("/proc/self/fd"))
    machine = Machine(backend, vm, routes)
    yield machine
    machine.function.close()
    assert backend.closed
    assert (vm.pins, vm.slots, vm.watched, routes.given, routes.attached) == ({}, {}, {}, set(), {})
    assert len(os.listdir("/proc/self/fd")) == before


def test_ids_and_class_are_the_device_s_and_cannot_be_written(machine: Machine) -> None:
    machine.write(0, 4, 0)
    assert [machine.read(register) for register in (0, 8, 0x2C)] == [0x12348086, 0x01080201, 0x56788086]
    assert machine.read(0x0E, 1) == 0


def test_all_ones_read_back_as_sizes_and_the_device_s_own_bars_stay(machine: Machine) -> None:
    before = bytes(machine.backend.config[BAR0:0x34])
    for register, expected in [
        (BAR0, (-TABLE_BAR_SIZE & ONES) | 4),
        (BAR0 + 4, ONES),
        (BAR2, (-0x1000 & ONES) | 8),
        (BAR2 + 4, 0),  # ports
        (ROM, (-0x1000 & ONES) | 1),
    ]:
        machine.write(register, 4, ONES)
        assert machine.read(register) == expected
    assert bytes(machine.backend.config[BAR0:0x34]) == before


def test_accesses_reach_the_device_and_whole_pages_are_mapped(machine: Machine, vm: FakeVm) -> None:
    machine.backend.memory[2][8:12] = b"abcd"
    base0, base2 = HIGH, machine.read(BAR2) & ~0xF
    assert machine.mmio.load(base2 + 8, 4) == ONES
    machine.write(COMMAND, 2, 0x6)
    assert machine.mmio.load(base2 + 8, 4) == int.from_bytes(b"abcd", "little")
    machine.mmio.store(base2 + 16, 8, 0x1122334455667788)
    assert machine.backend.memory[2][16:24] == bytes.fromhex("8877665544332211")
    assert sorted(vm.slots.values()) == [(base0, 0x2000)]  # the table and the pending bits have the rest
    machine.mmio.store(base0 + 0x2040, 4, 5)
    assert machine.backend.memory[0][0x2040] == 5  # behind the table, in its page
    machine.write(BAR0, 4, 0x80000)
    assert sorted(vm.slots.values()) == [(HIGH + 0x80000, 0x2000)]
    machine.write(COMMAND, 2, 0)
    assert vm.slots == {}


def test_the_rom_answers_when_it_is_enabled(machine: Machine) -> None:
    machine.backend.memory[abi.ROM][0:2] = b"\x55\xaa"
    where = machine.read(ROM)
    machine.write(COMMAND, 2, 2)
    assert machine.mmio.load(where, 2) == 0xFFFF
    machine.write(ROM, 4, where | 1)
    assert machine.mmio.load(where, 2) == 0xAA55
    machine.write(ROM, 4, where)
    assert machine.mmio.load(where, 2) == 0xFFFF


def test_the_command_register_is_of_both_and_status_of_the_device(machine: Machine) -> None:
    machine.write(COMMAND, 2, 0x0406)
    assert machine.backend.config[COMMAND : COMMAND + 2] == b"\x06\x04"
    machine.backend.config[6] = 0x18
    assert machine.read(0x06, 2) == 0x0818
    machine.backend.config[6] = 0x08
    assert machine.read(COMMAND, 4) == 0x08180406


def test_capabilities_are_in_the_device_s_order(machine: Machine) -> None:
    assert machine.capabilities() == [0x01, 0x05, 0x10, 0x11, 0x13]


def test_capabilities_without_interrupts_behind_them_are_hidden(vm: FakeVm, routes: FakeRoutes) -> None:
    backend = FakeBackend(config_of_a_device(), SIZES, {abi.INTX: 0, abi.MSIX: 0})
    machine = Machine(backend, vm, routes)
    assert machine.capabilities() == [0x01, 0x10, 0x13]
    assert machine.read(0x3D, 1) == 0
    assert vm.pins == {}
    machine.function.close()


def test_the_device_stays_awake_and_is_no_endpoint_of_a_link(machine: Machine) -> None:
    machine.write(PM + 4, 2, 3)
    assert machine.read(PM + 4, 2) == 0x000B
    assert machine.backend.config[PM + 4] == 0
    assert machine.read(EXPRESS + 2, 2) == 0x0092
    assert machine.read(EXPRESS + 0x0C) == 0
    machine.write(EXPRESS + 8, 2, 0x2830)
    assert machine.backend.config[EXPRESS + 8 : EXPRESS + 10] == b"\x30\x28"


def test_the_pin_is_in_force_until_messages_are(machine: Machine, vm: FakeVm) -> None:
    assert (machine.read(0x3C, 1), machine.read(0x3D, 1)) == (GSI, 1)
    ((fd, (gsi, resample)),) = vm.pins.items()
    assert (gsi, machine.backend.eventfds) == (GSI, {abi.INTX: [fd]})
    assert resample is not None
    os.eventfd_write(resample, 1)
    resampled = vm.watched[resample]
    assert callable(resampled)
    resampled(1)
    resampled(1)
    assert machine.backend.unmasked == 1
    machine.write(MSIX + 2, 2, 0x8000)
    assert vm.pins == {}
    assert [len(fds) for fds in machine.backend.eventfds.values()] == [0, 4]
    resampled(1)
    machine.write(MSIX + 2, 2, 0)
    assert len(vm.pins) == 1


def test_msix_delivers_through_the_trapped_table(machine: Machine, routes: FakeRoutes) -> None:
    machine.write(COMMAND, 2, 6)
    table = HIGH + 0x2000
    for at, value in ((0, ADDRESS), (4, 0), (8, DATA), (12, 0)):
        machine.mmio.store(table + 16 + at, 4, value)
    machine.write(MSIX + 2, 2, 0x8000)
    assert machine.read(MSIX, 4) == 0x80030000 | ADVANCED << 8 | 0x11
    for fd in machine.backend.eventfds[abi.MSIX]:
        os.eventfd_write(fd, 1)
    assert routes.delivered() == [(ADDRESS, DATA)]
    assert machine.mmio.load(HIGH + 0x3000, 8) == 0b1101
    assert machine.backend.memory[0][0x2000:0x2040] == bytes(0x40)


def test_msi_delivers_each_number_of_its_message(machine: Machine, routes: FakeRoutes) -> None:
    assert machine.read(MSI + 2, 2) == 0x0186
    machine.write(MSI + 4, 4, ADDRESS | 3)
    machine.write(MSI + 8, 4, 0)
    machine.write(MSI + 12, 2, DATA)
    machine.write(MSI + 2, 2, 0x21)  # four of them
    fds = machine.backend.eventfds[abi.MSI]
    assert len(fds) == 4
    machine.write(MSI + 16, 4, ONES)
    assert machine.read(MSI + 16) == 0xFF
    for fd in fds:
        os.eventfd_write(fd, 1)
    assert (routes.delivered(), machine.read(MSI + 20)) == ([], 0xF)
    machine.write(MSI + 16, 4, 0x1)
    base = DATA & ~3
    assert routes.delivered() == [(ADDRESS, base + 1), (ADDRESS, base + 2), (ADDRESS, base + 3)]
    machine.write(MSI + 2, 2, 0x1)
    assert len(machine.backend.eventfds[abi.MSI]) == 1
    machine.write(MSI + 2, 2, 0)
    assert machine.backend.eventfds[abi.MSI] == []
    assert machine.backend.config[MSI + 2 : MSI + 4] == b"\x87\x01"  # the device's own stays


@pytest.mark.parametrize(("register", "value"), [(EXPRESS + 8, 0xA810), (ADVANCED + 4, 1)], ids=["flr", "af"])
def test_a_function_level_reset_is_one(machine: Machine, vm: FakeVm, register: int, value: int) -> None:
    machine.write(COMMAND, 2, 0x406)
    machine.write(MSIX + 2, 2, 0x8000)
    machine.mmio.store(HIGH + 0x2000, 4, ADDRESS)
    machine.write(register, 2, value)
    assert machine.backend.resets == 1
    assert machine.read(COMMAND, 2) == 0
    assert (machine.read(BAR0), machine.read(MSIX + 2, 2)) == (4, 3)
    assert vm.slots == {}
    assert (machine.backend.eventfds[abi.MSIX], len(vm.pins)) == ([], 1)
    assert machine.read(register, 2) == value & 0x2810
    machine.write(BAR0 + 4, 4, HIGH >> 32)
    machine.write(COMMAND, 2, 2)
    assert machine.mmio.load(HIGH + 0x2000, 8) == 0
    assert machine.mmio.load(HIGH + 0x200C, 4) == 1


def refused(change: Callable[[bytearray], None], sizes: dict[int, int] | None = None) -> str:
    vm, routes = FakeVm(), FakeRoutes()
    config = config_of_a_device()
    change(config)
    backend = FakeBackend(config, SIZES | (sizes or {}), IRQS)
    with pytest.raises(ConfigError) as caught:
        PassThrough(backend, routes, vm, vm, vm, GSI)
    assert backend.closed
    assert (routes.given, vm.pins, vm.slots) == (set(), {}, {})
    return str(caught.value)


def test_devices_that_cannot_be_are_refused() -> None:
    assert "type 0" in refused(lambda config: config.__setitem__(slice(0, 2), b"\xff\xff"))
    assert "type 0" in refused(lambda config: config.__setitem__(0x0E, 1))
    assert "cannot be" in refused(lambda config: None, {0: 0x5000})
    assert "cannot be" in refused(lambda config: None, {2: 8})
    assert "has not" in refused(lambda config: config.__setitem__(MSIX + 4, 5))
    assert "has no" in refused(lambda config: config.__setitem__(MSIX + 5, 0x40))
    assert "has no" in refused(lambda config: config.__setitem__(MSIX + 9, 0x20))


def test_a_chain_of_capabilities_that_bites_its_tail_ends(vm: FakeVm, routes: FakeRoutes) -> None:
    config = config_of_a_device()
    config[ADVANCED + 1] = PM
    machine = Machine(FakeBackend(config, SIZES, IRQS), vm, routes)
    assert machine.capabilities() == [0x01, 0x05, 0x10, 0x11, 0x13]
    machine.function.close()


SOME = st.one_of(
    st.sampled_from([COMMAND, BAR0, 0x14, BAR2, ROM, 0x3C, MSI + 2, MSIX + 2]), st.integers(0, 255)
)
WRITES = st.lists(
    st.tuples(
        SOME,
        st.sampled_from([1, 2, 4]),
        st.one_of(st.sampled_from([0, 2, 6, LOW, 0x8000, 0x31, ONES]), st.integers(0, ONES)),
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=192, max_size=192), st.booleans(), WRITES)
def test_whatever_device_and_driver_do_nothing_breaks_and_nothing_is_left(
    noise: bytes, tame: bool, writes: list[tuple[int, int, int]]
) -> None:
    vm, routes = FakeVm(), FakeRoutes()
    config = config_of_a_device()
    if not tame:
        config[0x40:] = noise
    backend = FakeBackend(config, SIZES, IRQS)
    backend.regions[0].areas = [(0, TABLE_BAR_SIZE)]
    before = len(os.listdir("/proc/self/fd"))
    try:
        machine = Machine(backend, vm, routes)
    except ConfigError:
        assert backend.closed
    else:
        for register, size, value in writes:
            machine.write(register, size, value & (1 << 8 * size) - 1)
            machine.read(register, size)
            for gpa, _ in vm.slots.values():
                assert gpa % 0x1000 == 0
                machine.mmio.store(gpa + 0x2000, 4, value)
        machine.function.close()
    assert (vm.pins, vm.slots, vm.watched, routes.given, routes.attached) == ({}, {}, {}, set(), {})
    assert len(os.listdir("/proc/self/fd")) == before

"""Functions are found in their slots, and their BARs answer where a driver puts them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.bus import Bus
from pileus.errors import ConfigError
from pileus.pci.allocator import Window
from pileus.pci.bar import Bar
from pileus.pci.bus import PciBus
from pileus.pci.config_space import ConfigSpace
from pileus.pci.function import Function
from pileus.pci.host_bridge import ConfigPorts, Ecam, host_bridge

from .conftest import HIGH_BASE, Memory

SIZE = 0x1000
COMMAND, BAR0, BAR1 = 0x04, 0x10, 0x14
ONES = 0xFFFFFFFF


def function(name: str = "test", *, wide: bool = True, moves: list[int | None] | None = None) -> Function:
    made = Function(name, ConfigSpace(vendor=0x1AF4, device=0x1044))
    moved = None if moves is None else moves.append
    made.add_bar(Bar(0, SIZE, [(0, 0x100, Memory(0x100)), (0x800, 8, Memory(8))], wide=wide, moved=moved))
    return made


def ports_of(bus: PciBus) -> Bus:
    """The ports, as a guest reaches them."""
    ports = Bus("ports")
    ports.insert(0, 8, ConfigPorts(bus))
    return ports


def ecam_of(bus: PciBus) -> Bus:
    ecam = Bus("ecam")
    ecam.insert(0, 256 << 20, Ecam(bus))
    return ecam


def enable(bus: PciBus, slot: int) -> None:
    bus.write(slot << 3, COMMAND, 2, 2)


def test_functions_take_slots_in_order() -> None:
    bus = PciBus(Bus("mmio"), Window(0xC0000000, 0x10000))
    assert bus.add(host_bridge()) == 0
    assert [bus.add(function(wide=False)) for _ in range(3)] == [1, 2, 3]
    assert bus.add(function(), slot=9) == 9
    assert bus.free_slot() == 4
    with pytest.raises(ValueError, match="slot 9"):
        bus.add(function(), slot=9)


def test_a_33rd_function_is_refused(bus: PciBus) -> None:
    for _ in range(32):
        bus.add(host_bridge())
    with pytest.raises(ConfigError, match="at most 31 fit"):
        bus.add(host_bridge())


def test_absent_functions_read_as_ones(bus: PciBus) -> None:
    bus.add(host_bridge())
    assert bus.read(0, 0, 4) == 0x0D578086
    assert bus.read(0, 8, 4) == 0x06000000
    for devfn in (1, 8, 255):
        assert bus.read(devfn, 0, 4) == ONES
        bus.write(devfn, 4, 2, 0xFFFF)


@pytest.mark.parametrize(("wide", "base"), [(True, HIGH_BASE), (False, 0xC0000000)], ids=["64", "32"])
def test_a_bar_answers_once_memory_is_enabled(mmio: Bus, bus: PciBus, wide: bool, base: int) -> None:
    slot = bus.add(function(wide=wide))
    assert bus.read(slot << 3, BAR0, 4) == base & ONES | (4 if wide else 0)
    assert bus.read(slot << 3, BAR1, 4) == (base >> 32 if wide else 0)
    mmio.store(base + 4, 4, 0x12345678)
    assert mmio.load(base + 4, 4) == ONES
    enable(bus, slot)
    mmio.store(base + 4, 4, 0x12345678)
    assert mmio.load(base + 4, 4) == 0x12345678
    assert mmio.load(base + 0x200, 4) == ONES  # between the sections
    bus.write(slot << 3, COMMAND, 2, 0)
    assert mmio.load(base + 4, 4) == ONES


def test_all_ones_read_back_as_the_size(bus: PciBus) -> None:
    slot = bus.add(function())
    for register, expected in [(BAR0, (-SIZE & ONES) | 4), (BAR1, ONES), (0x18, 0), (0x30, 0)]:
        bus.write(slot << 3, register, 4, ONES)
        assert bus.read(slot << 3, register, 4) == expected


def test_a_bar_moves_with_its_registers(mmio: Bus, bus: PciBus) -> None:
    moves: list[int | None] = []
    slot = bus.add(function(moves=moves))
    enable(bus, slot)
    mmio.store(HIGH_BASE, 4, 0xCAFE)
    bus.write(slot << 3, BAR0, 4, 0xD0000)
    assert mmio.load(HIGH_BASE, 4) == ONES
    assert mmio.load(HIGH_BASE + 0xD0000, 4) == 0xCAFE
    bus.write(slot << 3, BAR1, 4, 0)  # now at 0xd0000, which is RAM
    bus.write(slot << 3, BAR0, 4, 0xC0000000)
    assert mmio.load(0xC0000000, 4) == 0xCAFE
    assert moves == [HIGH_BASE, None, HIGH_BASE + 0xD0000, None, 0xC0000000]


def test_a_bar_on_another_waits_until_that_leaves(mmio: Bus, bus: PciBus) -> None:
    first, second = bus.add(function()), bus.add(function())
    enable(bus, first)
    enable(bus, second)
    mmio.store(HIGH_BASE, 1, 1)
    mmio.store(HIGH_BASE + SIZE, 1, 2)
    bus.write(second << 3, BAR0, 4, 0)
    assert mmio.load(HIGH_BASE, 1) == 1
    bus.write(first << 3, BAR0, 4, 0x10000)
    assert mmio.load(HIGH_BASE, 1) == 2
    assert mmio.load(HIGH_BASE + 0x10000, 1) == 1


def test_a_place_where_another_device_is_answers_as_before(mmio: Bus, bus: PciBus) -> None:
    mmio.insert(0xC0010800, 4, Memory(4))
    slot = bus.add(function(wide=False))
    enable(bus, slot)
    bus.write(slot << 3, BAR0, 4, 0xC0010000)
    assert mmio.load(0xC0010800, 4) == 0
    assert mmio.load(0xC0010000, 4) == ONES
    bus.write(slot << 3, BAR0, 4, 0xC0020000)
    assert mmio.load(0xC0020000, 4) == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40),
            st.one_of(st.sampled_from([4, 5, 0x10, 0x11, 0x14, 0x17, 0x30]), st.integers(0, 4095)),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.sampled_from([0, 2, 0xC0000000, 0xC0001000, ONES, 0x10]), st.integers(0, ONES)),
        ),
        max_size=40,
    )
)
def test_no_write_lets_two_bars_answer_in_one_place(writes: list[tuple[int, int, int, int]]) -> None:
    mmio = Bus("mmio")
    low, high = Window(0xC0000000, 0x1000_0000), Window(HIGH_BASE, 0x1000_0000)
    bus = PciBus(mmio, low, high)
    made = [function("a"), function("b"), function("c", wide=False)]
    for each in made:
        bus.add(each)
    for devfn, register, size, value in writes:
        bus.write(devfn, register, size, value & (1 << (8 * size)) - 1)
        placed = [bar.gpa for each in made for bar in each.bars if bar.gpa is not None]
        assert len(placed) == len(set(placed))
        assert all((gpa, SIZE) in low or (gpa, SIZE) in high for gpa in placed)
        assert all(mmio.load(gpa, 4) == 0 for gpa in placed)


def test_mechanism_1_reads_and_writes_any_width(bus: PciBus) -> None:
    bus.add(host_bridge())
    slot = bus.add(function())
    ports = ports_of(bus)
    assert ports.load(0, 4) == 0
    assert ports.load(4, 4) == ONES  # not enabled
    ports.store(0, 4, 0x80000000 | slot << 11 | 3)
    assert ports.load(0, 4) == 0x80000000 | slot << 11
    assert ports.load(4, 4) == 0x10441AF4
    assert (ports.load(6, 2), ports.load(7, 1)) == (0x1044, 0x10)
    ports.store(0, 4, 0x80000000 | slot << 11 | COMMAND)
    ports.store(4, 1, 6)
    assert bus.read(slot << 3, COMMAND, 2) == 6


@pytest.mark.parametrize("address", [0x80010000, 0x80000100, 0x0], ids=["bus 1", "function 1", "disabled"])
def test_mechanism_1_has_nothing_elsewhere(bus: PciBus, address: int) -> None:
    bus.add(host_bridge())
    ports = ports_of(bus)
    ports.store(0, 4, address)
    assert ports.load(4, 4) == ONES
    ports.store(4, 4, 0)


def test_odd_accesses_to_the_address_port_are_ignored(bus: PciBus) -> None:
    ports = ports_of(bus)
    ports.store(0, 4, 0x80000000)
    for offset, size in [(0, 1), (0, 2), (1, 1), (3, 1), (2, 4), (6, 4), (7, 2)]:
        ports.store(offset, size, 0)
        assert ports.load(offset, size) == (1 << (8 * size)) - 1
    assert ports.load(0, 4) == 0x80000000


def test_ecam_decodes_device_function_and_register(bus: PciBus) -> None:
    bus.add(host_bridge())
    slot = bus.add(function())
    ecam = ecam_of(bus)
    assert ecam.load(0, 4) == 0x0D578086
    assert ecam.load(slot << 15, 4) == 0x10441AF4
    assert ecam.load(slot << 15 | 2, 2) == 0x1044
    for offset in (slot << 15 | 1 << 12, slot << 15 | 0x100, 5 << 15, 1 << 20, 255 << 20):
        assert ecam.load(offset, 4) == ONES
        ecam.store(offset, 4, 0)
    assert ecam.load(slot << 15 | 0xFE, 4) == ONES
    assert ecam.load(0, 8) == (1 << 64) - 1
    ecam.store(slot << 15 | COMMAND, 2, 6)
    assert bus.read(slot << 3, COMMAND, 2) == 6


@given(
    st.sampled_from([0, 8, 9, 16, 255]),
    st.one_of(st.integers(0, 255), st.sampled_from([0x40, 0x44, 0x46, 0x48])),
    st.sampled_from([1, 2, 4]),
)
def test_both_mechanisms_read_what_configuration_space_holds(devfn: int, register: int, size: int) -> None:
    """The compiled reads beside the Python they stand for, with a register that is made when it is read."""
    bus = PciBus(Bus("mmio"), Window(0xC0000000, 0x10000))
    bus.add(host_bridge())
    slow = function(wide=False)
    slow.config.before_read(0x44, 4, lambda _offset, _size: slow.config.set(0x44, 4, 0x5EED))
    bus.add(slow)
    ports, ecam = ports_of(bus), ecam_of(bus)
    expected = bus.read(devfn, register, size)
    slow.config.set(0x44, 4, 0)
    assert ecam.load(devfn << 12 | register, size) == expected
    if register % 4 + size <= 4:
        slow.config.set(0x44, 4, 0)
        ports.store(0, 4, 0x80000000 | devfn << 8 | register & 0xFC)
        assert ports.load(4 + register % 4, size) == expected


def test_the_address_port_is_state(bus: PciBus) -> None:
    ports = ConfigPorts(bus)
    ports.restore(0xFFFFFFFF)
    assert ports.state() == 0x80FFFFFC

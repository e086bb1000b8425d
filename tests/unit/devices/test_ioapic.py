"""The IOAPIC: its registers, and when it sends which message."""

import copy
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.bus import Bus
from pileus.devices.ioapic import PINS, WINDOW_SIZE, Ioapic

from .ioapic_twin import IoapicTwin

BASE = 0xFEC00000
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
MASKED, LEVEL, REMOTE_IRR, SEND_PENDING = 1 << 16, 1 << 15, 1 << 14, 1 << 12
VECTOR = 0x51
MESSAGE, LEVEL_MESSAGE = (0xFEE00000, VECTOR), (0xFEE00000, 0xC000 | VECTOR)


class Apics:
    """Local APICs, and KVM's table of routes."""

    def __init__(self) -> None:
        self.takes = True
        self.sent: list[tuple[int, int]] = []
        self.ended_pins: list[int] = []
        self.routes: dict[int, tuple[int, int] | None] = dict.fromkeys(range(PINS))
        self.tables = 0

    def route(self, messages: Mapping[int, tuple[int, int] | None]) -> None:
        self.routes |= messages
        self.tables += 1

    def signal(self, address: int, data: int) -> bool:
        self.sent.append((address, data))
        return self.takes

    def ended(self, pin: int) -> None:
        self.ended_pins.append(pin)


class Guest:
    """An IOAPIC as its guest, its devices and KVM see it."""

    def __init__(self) -> None:
        self.apics = Apics()
        self.ioapic = Ioapic(self.apics)
        self.bus = Bus("mmio")
        self.bus.insert(BASE, WINDOW_SIZE, self.ioapic)

    def read(self, index: int) -> int:
        self.bus.store(BASE + SELECT, 4, index)
        return self.bus.load(BASE + WINDOW, 4)

    def write(self, index: int, value: int) -> None:
        self.bus.store(BASE + SELECT, 4, index)
        self.bus.store(BASE + WINDOW, 4, value)

    def program(self, pin: int, low: int, high: int = 0) -> None:
        """As a driver does: masked until all is there."""
        self.write(0x10 + 2 * pin, MASKED)
        self.write(0x11 + 2 * pin, high)
        self.write(0x10 + 2 * pin, low)

    def low(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin)

    def end(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)


@pytest.fixture
def guest() -> Guest:
    return Guest()


REGISTERS = {  # index -> what it reads at first, and what it reads after all ones were written
    "id": (0x00, 0, 0x0F000000),
    "version": (0x01, 0x00170020, 0x00170020),
    "arbitration": (0x02, 0, 0),
    "nothing at 3": (0x03, 0, 0),
    "nothing at 0x0f": (0x0F, 0, 0),
    "first entry, low": (0x10, MASKED, 0x0001AFFF),
    "first entry, high": (0x11, 0, 0xFFFE0000),
    "last entry, low": (0x3E, MASKED, 0x0001AFFF),
    "last entry, high": (0x3F, 0, 0xFFFE0000),
    "nothing at 0x40": (0x40, 0, 0),
    "nothing at 0xff": (0xFF, 0, 0),
}


@pytest.mark.parametrize(("index", "reset", "written"), REGISTERS.values(), ids=REGISTERS)
def test_a_register_reads_what_the_data_sheet_says(
    guest: Guest, index: int, reset: int, written: int
) -> None:
    assert guest.read(index) == reset
    guest.write(index, 0xFFFFFFFF)
    assert guest.read(index) == written


def test_the_arbitration_id_follows_the_id(guest: Guest) -> None:
    guest.write(0x00, 0x05000000)
    assert guest.read(0x02) == 0x05000000


def test_the_index_is_a_byte(guest: Guest) -> None:
    guest.bus.store(BASE + SELECT, 4, 0xABCDEF01)
    assert guest.bus.load(BASE + SELECT, 4) == 0x01


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("offset", [SELECT, WINDOW, EOI])
def test_accesses_of_other_sizes_do_nothing(guest: Guest, offset: int, size: int) -> None:
    guest.bus.store(BASE + SELECT, 4, 0x10)
    before = copy.deepcopy(guest.ioapic.state())
    guest.bus.store(BASE + offset, size, (1 << 8 * size) - 1)
    assert guest.bus.load(BASE + offset, size) == (1 << 8 * size) - 1
    assert guest.ioapic.state() == before


@pytest.mark.parametrize("offset", [1, 4, 8, 0x14, 0x20, 0x44, 0xFFC])
def test_there_is_nothing_between_the_registers(guest: Guest, offset: int) -> None:
    before = copy.deepcopy(guest.ioapic.state())
    guest.bus.store(BASE + offset, 4, 0xFFFFFFFF)
    assert guest.bus.load(BASE + offset, 4) == 0xFFFFFFFF
    assert guest.ioapic.state() == before


MESSAGES = {  # the entry's halves -> its message
    "physical": ((0x51, 0x03000000), (0xFEE03000, 0x51)),
    "logical": ((0x51 | 1 << 11, 0x0F000000), (0xFEE0F004, 0x51)),
    "lowest priority": ((0x51 | 1 << 8, 0xFF000000), (0xFEEFF000, 0x151)),
    "a long destination": ((0x51, 0x02FE0000), (0xFEE02FE0, 0x51)),
    "level": ((0x51 | LEVEL, 0), (0xFEE00000, 0xC051)),
    "level, active low": ((0x51 | LEVEL | 1 << 13, 0), (0xFEE00000, 0xC051)),
    "smi": ((2 << 8, 0), (0xFEE00000, 0x200)),
    "nmi": ((4 << 8, 0), (0xFEE00000, 0x400)),
    "an nmi is an edge": ((4 << 8 | LEVEL, 0), (0xFEE00000, 0x400)),
    "init": ((5 << 8, 0), (0xFEE00000, 0x500)),
    "reserved": ((3 << 8, 0), None),
    "reserved, too": ((6 << 8, 0), None),
    "extint has no 8259": ((7 << 8, 0), None),
}


@pytest.mark.parametrize(("entry", "message"), MESSAGES.values(), ids=MESSAGES)
def test_an_entry_is_a_message(guest: Guest, entry: tuple[int, int], message: tuple[int, int] | None) -> None:
    guest.program(7, *entry)
    assert guest.apics.routes[7] == message
    guest.ioapic.set_line(7, True)
    assert guest.apics.sent == ([] if message is None else [message])


def test_a_masked_entry_leads_nowhere(guest: Guest) -> None:
    guest.program(4, VECTOR)
    assert guest.apics.routes[4] == MESSAGE
    guest.write(0x18, VECTOR | MASKED)
    assert guest.apics.routes == dict.fromkeys(range(PINS))


def test_an_edge_is_sent_once_and_a_masked_one_is_lost(guest: Guest) -> None:
    guest.ioapic.set_line(4, True)
    guest.program(4, VECTOR)
    assert guest.apics.sent == []
    guest.ioapic.set_line(4, True)
    assert guest.apics.sent == []
    for _ in range(2):
        guest.ioapic.set_line(4, False)
        guest.ioapic.set_line(4, True)
        guest.ioapic.set_line(4, True)
    assert guest.apics.sent == [MESSAGE, MESSAGE]
    assert not guest.low(4) & REMOTE_IRR


def test_a_level_is_sent_again_at_each_end_of_interrupt_while_it_is_asserted(guest: Guest) -> None:
    guest.program(9, VECTOR | LEVEL)
    guest.ioapic.set_line(9, True)
    guest.ioapic.set_line(9, True)
    assert guest.apics.sent == [LEVEL_MESSAGE]
    assert guest.low(9) == VECTOR | LEVEL | REMOTE_IRR
    guest.end(VECTOR + 1)
    assert len(guest.apics.sent) == 1
    guest.end(VECTOR)
    assert len(guest.apics.sent) == 2
    guest.ioapic.set_line(9, False)
    guest.end(VECTOR)
    assert len(guest.apics.sent) == 2
    assert guest.low(9) == VECTOR | LEVEL
    assert guest.apics.ended_pins == [9, 9]


def test_a_level_that_is_asserted_while_masked_is_sent_once_unmasked(guest: Guest) -> None:
    guest.ioapic.set_line(9, True)
    assert guest.apics.sent == []
    guest.program(9, VECTOR | LEVEL)
    assert guest.apics.sent == [LEVEL_MESSAGE]


def test_a_latched_line_falls_with_the_end_of_interrupt(guest: Guest) -> None:
    guest.program(9, VECTOR | LEVEL)
    guest.ioapic.latch(9)
    guest.end(VECTOR)
    assert guest.apics.sent == [LEVEL_MESSAGE]
    assert guest.apics.ended_pins == [9]
    guest.ioapic.latch(9)
    guest.ioapic.unlatch(9)
    guest.end(VECTOR)
    assert len(guest.apics.sent) == 2


def test_pins_with_one_vector_end_together(guest: Guest) -> None:
    for pin in (9, 10):
        guest.program(pin, VECTOR | LEVEL)
        guest.ioapic.latch(pin)
    guest.end(VECTOR)
    assert guest.apics.ended_pins == [9, 10]


def test_the_register_for_ends_of_interrupt_ends_one(guest: Guest) -> None:
    guest.program(9, VECTOR | LEVEL)
    guest.ioapic.latch(9)
    guest.bus.store(BASE + EOI, 4, VECTOR)
    assert guest.apics.ended_pins == [9]
    assert not guest.low(9) & REMOTE_IRR


def test_one_that_is_masked_while_it_is_served_keeps_its_route_until_its_end(guest: Guest) -> None:
    """Else KVM would not tell of the end."""
    guest.program(9, VECTOR | LEVEL)
    guest.ioapic.set_line(9, True)
    guest.write(0x10 + 18, VECTOR | LEVEL | MASKED)
    assert guest.apics.routes[9] == LEVEL_MESSAGE
    guest.end(VECTOR)
    assert guest.apics.routes[9] is None
    assert guest.apics.sent == [LEVEL_MESSAGE]
    guest.write(0x10 + 18, VECTOR | LEVEL)
    assert guest.apics.sent == 2 * [LEVEL_MESSAGE]


def test_switching_to_edge_and_back_clears_remote_irr(guest: Guest) -> None:
    """Linux does so where it knows no other way."""
    guest.program(9, VECTOR | LEVEL)
    guest.ioapic.set_line(9, True)
    guest.ioapic.set_line(9, False)
    guest.write(0x10 + 18, VECTOR | MASKED)
    guest.write(0x10 + 18, VECTOR | LEVEL)
    assert guest.low(9) == VECTOR | LEVEL


def test_the_guest_cannot_write_remote_irr_or_the_delivery_status(guest: Guest) -> None:
    guest.program(9, VECTOR | LEVEL | REMOTE_IRR | SEND_PENDING)
    assert guest.low(9) == VECTOR | LEVEL


def test_what_no_local_apic_takes_stays_pending(guest: Guest) -> None:
    guest.apics.takes = False
    guest.program(9, VECTOR | LEVEL, 0x77000000)
    guest.ioapic.set_line(9, True)
    assert guest.low(9) == VECTOR | LEVEL | SEND_PENDING
    guest.apics.takes = True
    guest.write(0x11 + 18, 0)
    assert guest.low(9) == VECTOR | LEVEL | REMOTE_IRR


def test_a_state_is_taken_back_and_what_is_due_is_sent(guest: Guest) -> None:
    guest.apics.takes = False
    guest.program(3, VECTOR)
    guest.program(9, VECTOR + 1 | LEVEL)
    guest.ioapic.set_line(9, True)
    guest.write(0x00, 0x02000000)
    twin = Guest()
    twin.ioapic.restore(guest.ioapic.state())
    assert twin.apics.tables == 1
    assert twin.apics.routes == guest.apics.routes
    assert twin.apics.sent == [(0xFEE00000, 0xC000 | VECTOR + 1)]
    assert twin.low(9) & REMOTE_IRR
    assert twin.read(0x00) == 0x02000000


def test_a_state_in_service_is_not_sent_again(guest: Guest) -> None:
    guest.program(9, VECTOR | LEVEL)
    guest.ioapic.latch(9)
    twin = Guest()
    twin.ioapic.restore(guest.ioapic.state())
    assert twin.ioapic.state() == guest.ioapic.state()
    assert twin.apics.sent == []
    twin.end(VECTOR)
    assert twin.apics.ended_pins == [9]


def test_a_state_with_other_pins_is_refused(guest: Guest) -> None:
    with pytest.raises(ValueError, match="there are 24 entries, not 1"):
        guest.ioapic.restore(guest.ioapic.state() | {"entries": [0]})


SOME_PINS = st.sampled_from([0, 4, 9, 23])
# Few vectors, and all fields likely: so that ends of interrupt meet interrupts.
LOW = st.builds(
    lambda vector, mode, rest: vector | mode << 8 | rest,
    st.sampled_from([0, VECTOR, VECTOR + 1, 255]),
    st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5, 6, 7]),
    st.sampled_from([0, LEVEL, MASKED, LEVEL | MASKED, LEVEL | REMOTE_IRR, LEVEL | 1 << 11 | 1 << 13]),
)
STEPS = st.one_of(
    st.tuples(st.just("low"), SOME_PINS, LOW),
    st.tuples(st.just("write"), st.sampled_from([SELECT, WINDOW, EOI]), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("select"), st.integers(0, 0x45), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("wild"), st.integers(0, WINDOW_SIZE - 8), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("end"), st.sampled_from([VECTOR, VECTOR + 1, 0, 255]), st.booleans()),
    st.tuples(st.just("line"), SOME_PINS, st.booleans()),
    st.tuples(st.just("latch"), SOME_PINS, st.booleans()),
    st.tuples(st.just("take"), st.just(0), st.booleans()),
)


@settings(max_examples=150)
@given(st.lists(STEPS, max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_whatever_happens_the_slow_twin_does_the_same(steps: list[tuple[str, int, int]], size: int) -> None:
    guest, twin = Guest(), IoapicTwin()
    for kind, where, value in steps:
        accesses = []
        if kind == "low":
            accesses = [(SELECT, 4, 0x10 + 2 * where), (WINDOW, 4, value)]
        elif kind == "select":
            accesses = [(SELECT, 4, where), (WINDOW, 4, value)]
        elif kind == "write":
            accesses = [(where, 4, value)]
        elif kind == "wild":
            accesses = [(where, size, value & (1 << 8 * size) - 1)]
        elif kind == "end":
            if value:
                accesses = [(EOI, 4, where)]
            else:
                guest.end(where)
                twin.end_of_interrupt(where)
        elif kind == "line":
            guest.ioapic.set_line(where, bool(value))
            twin.set_line(where, bool(value))
        elif kind == "latch":
            guest.ioapic.latch(where) if value else guest.ioapic.unlatch(where)
            twin.latch(where) if value else twin.unlatch(where)
        else:
            guest.apics.takes = twin.takes = bool(value)
        for offset, width, written in accesses:
            guest.bus.store(BASE + offset, width, written)
            twin.write(offset, width, written)
            assert guest.bus.load(BASE + offset, width) == twin.read(offset, width)
        assert guest.apics.sent == twin.sent
        assert guest.apics.ended_pins == twin.ended
        assert guest.apics.routes == twin.routes()
    index = twin.index
    assert [guest.read(number) for number in range(0x40)] == [_read(twin, number) for number in range(0x40)]
    guest.bus.store(BASE + SELECT, 4, index)
    restored = Guest()
    restored.apics.takes = False
    restored.ioapic.restore(guest.ioapic.state())
    assert restored.ioapic.state() == guest.ioapic.state()
    assert restored.apics.routes == guest.apics.routes


def _read(twin: IoapicTwin, index: int) -> int:
    twin.write(SELECT, 4, index)
    return twin.read(WINDOW, 4)

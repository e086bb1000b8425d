"""Which device answers an address."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.bus import Bus, PythonDevice


class Named(PythonDevice):
    """Answers with a number of its own, and remembers what was written."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.number << 8 | offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


RANGES = st.lists(st.tuples(st.integers(0, 120), st.integers(1, 12)), max_size=12)


@given(ranges=RANGES, address=st.integers(0, 140), size=st.sampled_from([1, 2, 4, 8]))
def test_the_device_around_the_whole_access_answers(
    ranges: list[tuple[int, int]], address: int, size: int
) -> None:
    bus = Bus("test")
    placed: list[tuple[int, int, int]] = []
    for number, (base, length) in enumerate(ranges):
        if any(base < other + its and other < base + length for other, its, _ in placed):
            with pytest.raises(ValueError, match="overlaps"):
                bus.insert(base, length, Named(number))
        else:
            bus.insert(base, length, Named(number))
            placed.append((base, length, number))
    ones = (1 << 8 * size) - 1
    expected = next(
        ((number << 8 | address - base) & ones for base, length, number in placed
         if base <= address and address + size <= base + length),
        ones,
    )  # fmt: skip
    assert bus.load(address, size) == expected


def test_a_write_arrives_with_offset_size_and_value() -> None:
    bus, device = Bus("test"), Named(0)
    bus.insert(0x100, 8, device)
    bus.store(0x104, 4, 0xDEADBEEF)
    bus.store(0x106, 4, 1)  # reaches past the end: nobody's
    assert device.written == [(4, 4, 0xDEADBEEF)]


def test_a_removed_device_is_asked_no_more() -> None:
    bus = Bus("test")
    bus.insert(0, 4, Named(1))
    bus.remove(0)
    assert bus.load(0, 1) == 0xFF
    bus.insert(0, 4, Named(2))
    assert bus.load(0, 2) == 0x200
    with pytest.raises(KeyError):
        bus.remove(1)


def test_the_last_address_can_be_a_devices() -> None:
    bus = Bus("test")
    bus.insert((1 << 64) - 1, 1, Named(3))
    assert bus.load((1 << 64) - 1, 1) == 0
    with pytest.raises(ValueError, match="no range"):
        bus.insert((1 << 64) - 1, 2, Named(4))


def test_what_a_device_raises_while_it_is_removed_still_comes_out() -> None:
    class Leaving(PythonDevice):
        def read(self, offset: int, size: int) -> int:
            bus.remove(0)
            raise ZeroDivisionError

    bus = Bus("test")
    bus.insert(0, 4, Leaving())
    with pytest.raises(ZeroDivisionError):
        bus.load(0, 1)


def test_what_a_device_raises_comes_out_once() -> None:
    class Broken(PythonDevice):
        def read(self, offset: int, size: int) -> int:
            raise ZeroDivisionError

    bus = Bus("test")
    bus.insert(0, 4, Broken())
    with pytest.raises(ZeroDivisionError):
        bus.load(0, 1)
    assert bus.take_error() is None

"""Which device answers an address."""

import threading
from pathlib import Path

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


class Leaving(PythonDevice):
    """Leaves its bus in the middle of an access."""

    def __init__(self, bus: Bus, *, broken: bool) -> None:
        self.bus = bus
        self.broken = broken

    def read(self, offset: int, size: int) -> int:
        self.bus.remove(0)
        if self.broken:
            raise ZeroDivisionError
        return 0x55


def test_a_device_may_leave_while_it_answers() -> None:
    bus = Bus("test")
    bus.insert(0, 4, Leaving(bus, broken=False))
    assert bus.load(0, 1) == 0x55
    assert bus.load(0, 1) == 0xFF


def test_the_error_of_a_device_that_left_is_told() -> None:
    bus = Bus("test")
    bus.insert(0, 4, Leaving(bus, broken=True))
    with pytest.raises(ZeroDivisionError):
        bus.load(0, 1)


def test_devices_come_and_go_while_others_look_them_up() -> None:
    """What stays always answers; what comes and goes answers as itself or not at all."""
    bus, stop = Bus("test"), threading.Event()
    bus.insert(0x100, 2, Named(0x77))
    wrong: list[int] = []

    def look() -> None:
        while not stop.is_set():
            if (stays := bus.load(0x100, 2)) != 0x7700:
                wrong.append(stays)
            if (goes := bus.load(0, 2)) not in (0x100, 0xFFFF):
                wrong.append(goes)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        bus.insert(0, 16, Named(1))
        bus.remove(0)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_device_that_moves_to_and_fro_takes_no_memory() -> None:
    """A guest moves a BAR as often as it likes."""
    bus, device = Bus("test"), Named(1)
    for base in range(0, 640, 16):
        bus.insert(1000 + base, 16, Named(2))

    def pages() -> int:
        for _ in range(2000):
            bus.insert(0, 16, device)
            bus.remove(0)
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = pages()
    assert pages() - before < 100  # a table of 41 ranges is 1 KiB


@pytest.mark.parametrize("size", [0, 9])
def test_an_access_of_no_possible_size_is_refused(size: int) -> None:
    bus = Bus("test")
    with pytest.raises(ValueError, match=f"1 to 8 bytes, not {size}"):
        bus.load(0, size)
    with pytest.raises(ValueError, match=f"1 to 8 bytes, not {size}"):
        bus.store(0, size, 0)


@pytest.mark.parametrize(("base", "size"), [(-1, 4), (0, 0), (0, -1), (1, 1 << 64)])
def test_a_range_outside_the_address_space_is_refused(base: int, size: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        Bus("test").insert(base, size, Named(0))


@pytest.mark.parametrize("answer", [-1, 1 << 70 | 0x1234])
def test_an_answer_is_cut_to_the_access(answer: int) -> None:
    class Wide(PythonDevice):
        def read(self, offset: int, size: int) -> int:
            return answer

    bus = Bus("test")
    bus.insert(0, 8, Wide())
    assert bus.load(0, 2) == answer & 0xFFFF


def test_what_a_device_raises_comes_out_once() -> None:
    class Broken(PythonDevice):
        def read(self, offset: int, size: int) -> int:
            raise ZeroDivisionError

    bus = Bus("test")
    bus.insert(0, 4, Broken())
    with pytest.raises(ZeroDivisionError):
        bus.load(0, 1)
    assert bus.take_error() is None


def test_a_bus_tells_how_often_a_device_was_used_and_for_how_long() -> None:
    bus = Bus("ports")
    used, idle = PythonDevice(), PythonDevice()
    bus.insert(0x10, 4, used)
    bus.insert(0x20, 4, idle)
    for _ in range(3):
        bus.load(0x11, 1)
    bus.store(0x12, 1, 0)
    ((base, device, accesses, nanoseconds),) = bus.usage
    assert (base, device, accesses) == (0x10, used, 4)
    assert nanoseconds > 0

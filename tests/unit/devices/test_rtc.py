"""The clock at fixed dates, register by register."""

import calendar

import pytest

from pileus.arch.x86_64.layout import GIB, MIB
from pileus.bus import Bus
from pileus.devices.rtc import Rtc

PORT = 0x70
SATURDAY_AFTERNOON = calendar.timegm((2024, 2, 24, 15, 7, 58))
SUNDAY_MIDNIGHT = calendar.timegm((2031, 12, 28, 0, 59, 9))
CLOCK = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32]


def make(seconds: float = SATURDAY_AFTERNOON, ram_size: int = 512 * MIB) -> Bus:
    bus = Bus("ports")
    bus.insert(PORT, 2, Rtc(ram_size, lambda: seconds))
    return bus


def get(bus: Bus, register: int) -> int:
    bus.store(PORT, 1, register)
    return bus.load(PORT + 1, 1)


def put(bus: Bus, register: int, value: int) -> None:
    bus.store(PORT, 1, register)
    bus.store(PORT + 1, 1, value)


@pytest.mark.parametrize(
    ("register_b", "seconds", "expected"),
    [
        (0x02, SATURDAY_AFTERNOON, [0x58, 0x07, 0x15, 7, 0x24, 0x02, 0x24, 0x20]),
        (0x06, SATURDAY_AFTERNOON, [58, 7, 15, 7, 24, 2, 24, 20]),
        (0x00, SATURDAY_AFTERNOON, [0x58, 0x07, 0x83, 7, 0x24, 0x02, 0x24, 0x20]),
        (0x04, SATURDAY_AFTERNOON, [58, 7, 0x83, 7, 24, 2, 24, 20]),
        (0x02, SUNDAY_MIDNIGHT, [0x09, 0x59, 0x00, 1, 0x28, 0x12, 0x31, 0x20]),
        (0x00, SUNDAY_MIDNIGHT, [0x09, 0x59, 0x12, 1, 0x28, 0x12, 0x31, 0x20]),
    ],
)
def test_tells_the_time_in_the_format_of_register_b(
    register_b: int, seconds: int, expected: list[int]
) -> None:
    bus = make(seconds)
    put(bus, 0x0B, register_b)
    assert [get(bus, register) for register in CLOCK] == expected


def test_starts_in_bcd_and_24_hours_with_a_good_battery() -> None:
    bus = make()
    assert [get(bus, register) for register in (0x0A, 0x0B, 0x0C, 0x0D)] == [0x26, 0x02, 0, 0x80]


def test_the_guest_cannot_set_the_clock_nor_the_memory_size() -> None:
    bus = make()
    for register in (*CLOCK, 0x0C, 0x0D, 0x34, 0x5D):
        before = get(bus, register)
        put(bus, register, before ^ 0x11)
        assert get(bus, register) == before


def test_other_registers_are_storage_and_the_index_has_7_bits() -> None:
    bus = make()
    put(bus, 0x8F, 0x05)  # NMIs masked
    assert get(bus, 0x0F) == 0x05
    assert bus.load(PORT, 1) == 0x0F


@pytest.mark.parametrize(
    ("ram_size", "low", "high"),
    [
        (8 * MIB, 0, 0),
        (512 * MIB, (512 - 16) * 16, 0),
        (3 * GIB, (3072 - 16) * 16, 0),
        (4 * GIB, (3072 - 16) * 16, 1024 * 16),
        (128 * GIB, (3072 - 16) * 16, 125 * 1024 * 16),
    ],
)
def test_tells_the_memory_size_in_64_kib(ram_size: int, low: int, high: int) -> None:
    bus = make(ram_size=ram_size)
    assert get(bus, 0x34) | get(bus, 0x35) << 8 == low
    assert get(bus, 0x5B) | get(bus, 0x5C) << 8 | get(bus, 0x5D) << 16 == high


@pytest.mark.parametrize("size", [2, 4])
def test_only_bytes_are_answered(size: int) -> None:
    rtc = Rtc(512 * MIB, lambda: SATURDAY_AFTERNOON)
    rtc.write(0, size, 0x0D)
    assert rtc.read(0, size) == (1 << 8 * size) - 1
    assert rtc.read(0, 1) == 0


def test_a_restored_clock_keeps_its_registers_and_tells_the_time_of_now() -> None:
    old, new = Rtc(MIB, lambda: SATURDAY_AFTERNOON), Rtc(MIB, lambda: SUNDAY_MIDNIGHT)
    for offset, value in ((0, 0x0B), (1, 0x06), (0, 0x00)):
        old.write(offset, 1, value)
    new.restore(old.state())
    assert new.read(1, 1) == 9
    assert new.state() == old.state()


@pytest.mark.parametrize("bad", [{"registers": b""}, {"index": b"x"}, {"registers": 5}])
def test_a_state_that_is_none_is_refused(bad: dict[str, int | bytes]) -> None:
    rtc = Rtc(MIB)
    with pytest.raises(ValueError, match="not a state"):
        rtc.restore(rtc.state() | bad)

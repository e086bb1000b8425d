import pytest

from pileus.bus import Bus
from pileus.devices.power import Power
from pileus.devices.pvpanic import CRASH_LOADED, PANICKED, SHUTDOWN, PvPanic

PORT, PANIC_PORT = 0x3C0, 0x505


@pytest.fixture
def calls() -> list[object]:
    return []


@pytest.fixture
def bus(calls: list[object]) -> Bus:
    bus = Bus("ports")
    bus.insert(PORT, 4, Power(lambda: calls.append("reset"), lambda: calls.append("power off")))
    bus.insert(PANIC_PORT, 1, PvPanic(calls.append))
    return bus


@pytest.mark.parametrize(("value", "call"), [(0x01, "reset"), (0x34, "power off")])
def test_acpi_resets_and_powers_off(bus: Bus, calls: list[object], value: int, call: str) -> None:
    bus.store(PORT, 1, value)
    assert calls == [call]


def test_nothing_else_does(bus: Bus, calls: list[object]) -> None:
    for value in set(range(256)) - {0x01, 0x34}:
        bus.store(PORT, 1, value)
    for port in (PORT + 1, PORT + 2, PORT + 3):
        bus.store(port, 1, 0x34)
        assert bus.load(port, 1) == 0
    assert calls == []


@pytest.mark.parametrize("event", [PANICKED, CRASH_LOADED, SHUTDOWN, PANICKED | CRASH_LOADED])
def test_a_panic_is_told(bus: Bus, calls: list[object], event: int) -> None:
    assert bus.load(PANIC_PORT, 1) & event == event
    bus.store(PANIC_PORT, 1, event | 0xF0)
    assert calls == [event]


def test_an_event_nobody_knows_is_ignored(bus: Bus, calls: list[object]) -> None:
    bus.store(PANIC_PORT, 1, 0xF8)
    assert calls == []

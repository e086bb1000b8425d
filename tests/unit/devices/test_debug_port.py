import pytest

from pileus.bus import Bus
from pileus.devices.debug_port import LOG_BURST, LOG_PERIOD, MARKS_MAX, DebugPort, line

PORT = 0x80


class Bench:
    """A debug port at its port, on a clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.device = DebugPort(self.lines.append, lambda: self.now)
        self.bus = Bus("ports")
        self.bus.insert(PORT, 1, self.device)

    def mark(self, code: int) -> None:
        self.bus.store(PORT, 1, code)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("code", "seconds", "text"),
    [
        (0x00, 0.0, "[Debug I/O port: Firmware code 0x0] 0.000000 seconds"),
        (0x1F, 0.000007, "[Debug I/O port: Firmware code 0x1f] 0.000007 seconds"),
        (0x20, 1.5, "[Debug I/O port: Bootloader code 0x20] 1.500000 seconds"),
        (0x40, 2.000001, "[Debug I/O port: Kernel code 0x40] 2.000001 seconds"),
        (0x60, 12.9999999, "[Debug I/O port: Userspace code 0x60] 13.000000 seconds"),
        (0xFF, 61.25, "[Debug I/O port: Custom code 0xff] 61.250000 seconds"),
    ],
)
def test_a_line_holds_the_microseconds_of_its_second(code: int, seconds: float, text: str) -> None:
    assert line(code, seconds) == text


def test_a_code_is_logged_with_the_time_since_the_vm_was_created(bench: Bench) -> None:
    bench.now += 3.25
    bench.mark(0x41)
    assert bench.lines == ["[Debug I/O port: Kernel code 0x41] 3.250000 seconds"]
    assert bench.device.marks == [(0x41, 3.25)]


def test_a_guest_cannot_flood_the_log_nor_the_memory(bench: Bench) -> None:
    for _ in range(MARKS_MAX + 1):
        bench.mark(0x40)
    assert len(bench.lines) == LOG_BURST
    assert len(bench.device.marks) == MARKS_MAX
    assert bench.device.suppressed == MARKS_MAX + 1 - LOG_BURST
    bench.now += LOG_PERIOD
    bench.mark(0x60)
    assert len(bench.lines) == LOG_BURST + 1


def test_reads_ones_and_takes_bytes_only(bench: Bench) -> None:
    bench.device.write(0, 2, 0x4041)
    assert bench.device.marks == []
    assert bench.bus.load(PORT, 1) == 0xFF

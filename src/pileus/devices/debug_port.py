"""Port 0x80: a guest marks a moment of its start with a code, which is logged with the time it took.

Linux also writes here to pass a microsecond (its ``io_delay``), so a code proves little by itself.
Source: Cloud Hypervisor 0.3, "Debug I/O port".
"""

import time

from pileus.bus import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RANGES = (  # last code -> who writes it
    (0x1F, "Firmware"),
    (0x3F, "Bootloader"),
    (0x5F, "Kernel"),
    (0x7F, "Userspace"),
    (0xFF, "Custom"),
)
MARKS_MAX = 4096  # what is kept for measurements
LOG_BURST, LOG_PERIOD = 10, 5.0  # lines per seconds that a guest may fill the log with


class DebugPort(PythonDevice):
    """One port. Times are seconds since ``created``, on the clock ``now``; ``log`` gets each line."""

    def __init__(
        self,
        log: "Callable[[str], None]",
        now: "Callable[[], float]" = time.monotonic,
        created: float | None = None,
    ) -> None:
        self.marks: list[tuple[int, float]] = []  # (code, seconds), the first MARKS_MAX of them
        self.suppressed = 0  # lines that were not logged
        self._log = log
        self._now = now
        self._created = now() if created is None else created
        self._burst: list[float] = []  # when the last lines were logged

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        seconds = max(0.0, self._now() - self._created)
        if len(self.marks) < MARKS_MAX:
            self.marks.append((value, seconds))
        if self._may_log(seconds):
            self._log(line(value, seconds))
        else:
            self.suppressed += 1

    def state(self) -> dict[str, int]:
        return {}  # times are this process's own

    def restore(self, state: dict[str, int]) -> None:
        pass

    def _may_log(self, seconds: float) -> bool:
        self._burst = [each for each in self._burst if seconds - each < LOG_PERIOD]
        if len(self._burst) >= LOG_BURST:
            return False
        self._burst.append(seconds)
        return True


def line(code: int, seconds: float) -> str:
    """What the log says: the fraction is the microseconds of that second."""
    who = next(who for last, who in RANGES if code <= last)
    whole, micros = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"[Debug I/O port: {who} code 0x{code:x}] {whole}.{micros:06} seconds"

"""The keyboard controller's ports, as far as PCs without a keyboard need them: reset, and the NMI status.

Source: Cloud Hypervisor 0.3; Linux drivers/input/serio/i8042.c for what a probe waits for.
"""

from pileus.bus import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DATA, NMI_STATUS, STATUS = 0, 1, 4  # offsets from port 0x60; STATUS takes commands when written
TIMER2_OUTPUT = 0x20
OUTPUT_FULL = 0x01
READ_CONFIGURATION, PULSE_RESET = 0x20, 0xFE


class I8042(PythonDevice):
    """Five ports. ``reset`` is called, on the vCPU's thread, when the guest pulses the CPU's reset line.

    A driver that asks for the configuration byte gets another one each time. Linux believes it when two in
    a row agree, and gives up after ten; were there no answer, it would wait half a second for the first.
    """

    def __init__(self, reset: "Callable[[], None]") -> None:
        self._reset = reset
        self._answer = 0x00  # the next configuration byte
        self._full = False  # it waits at DATA

    def read(self, offset: int, size: int) -> int:
        if offset == NMI_STATUS:
            return TIMER2_OUTPUT
        if offset == STATUS:
            return OUTPUT_FULL if self._full else 0
        if offset == DATA and self._full:
            self._full = False
            return self._answer
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != STATUS:
            return
        if value == PULSE_RESET:
            self._reset()
        elif value == READ_CONFIGURATION:
            self._answer ^= 0xFF
            self._full = True

    def state(self) -> dict[str, int]:
        return {"answer": self._answer, "full": int(self._full)}

    def restore(self, state: dict[str, int]) -> None:
        self._answer = state["answer"] & 0xFF
        self._full = bool(state["full"])

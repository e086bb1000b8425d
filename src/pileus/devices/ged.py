"""The generic event device: how the host tells a guest without a chipset that its power button was pressed.

One port holds the events that are waiting, a bit each; reading it takes them all. Each event raises the
interrupt, whose ``_EVT`` method (arch.x86_64.acpi.dsdt) reads the port and notifies the event's device.

Source: ACPI 6.3, 5.6.9 (Interrupt-signaled ACPI events), 4.8.2.2.1.2 (Control Method Power Button)
"""

import _thread
import os

from pileus.bus import PythonDevice

POWER_BUTTON = 1 << 0


class Ged(PythonDevice):
    """One port. ``call_fd`` is an irqfd, which stays the caller's."""

    def __init__(self, call_fd: int) -> None:
        self._call_fd = call_fd
        self._waiting = 0
        self._lock = _thread.allocate_lock()  # events come from the control loop

    def notify(self, events: int) -> None:
        """Tell the guest of ``events``; from any thread."""
        with self._lock:
            self._waiting |= events
        os.eventfd_write(self._call_fd, 1)

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            waiting, self._waiting = self._waiting, 0
        return waiting

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def state(self) -> dict[str, int]:
        return {"waiting": self._waiting}

    def restore(self, state: dict[str, int]) -> None:
        """Take the events back, and interrupt for them again: it does no harm where the guest had heard."""
        if waiting := state["waiting"] & POWER_BUTTON:
            self.notify(waiting)

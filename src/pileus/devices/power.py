"""The ACPI sleep control and reset registers: how a guest without a chipset powers off and reboots.

Source: ACPI 6.3, 4.8.3.6 (Reset Register), 4.8.3.7 (Sleep Control and Status Registers); the values as in
Cloud Hypervisor 0.3.
"""

from pileus.bus import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL = 0  # sleep control, sleep status and reset register are all at the first of the four ports
RESET_VALUE = 0x01
SLEEP_ENABLE, SLEEP_TYPE_SHIFT, S5 = 0x20, 2, 5
POWER_OFF = SLEEP_ENABLE | S5 << SLEEP_TYPE_SHIFT


class Power(PythonDevice):
    """Four ports. ``reset`` or ``power_off`` is called on the vCPU's thread."""

    def __init__(self, reset: "Callable[[], None]", power_off: "Callable[[], None]") -> None:
        self._calls = {RESET_VALUE: reset, POWER_OFF: power_off}

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == CONTROL and value & 0xFF in self._calls:
            self._calls[value & 0xFF]()

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None:
        pass

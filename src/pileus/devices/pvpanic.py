"""pvpanic: a guest tells that it panicked.

Source: QEMU, docs/specs/pvpanic.rst (ISA Interface, Bit Definition); ACPI finds it as QEMU0001.
"""

from pileus.bus import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PANICKED = 0x01  # the guest is lost: the host decides
CRASH_LOADED = 0x02  # the guest panicked, and handles that itself (kdump)
SHUTDOWN = 0x04  # a regular shutdown, of a guest that has no other way to tell
EVENTS = PANICKED | CRASH_LOADED | SHUTDOWN


class PvPanic(PythonDevice):
    """One port. ``event`` is called with the bits that the guest set, on the vCPU's thread."""

    def __init__(self, event: "Callable[[int], None]", supported: int = EVENTS) -> None:
        self._event = event
        self._supported = supported

    def read(self, offset: int, size: int) -> int:
        return self._supported

    def write(self, offset: int, size: int, value: int) -> None:
        if known := value & self._supported:
            self._event(known)

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None:
        pass

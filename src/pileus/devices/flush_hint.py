"""A flush hint address: a store there makes durable what was stored in an NVDIMM before.

Linux writes to it for each fsync of what lies on one.

Source: ACPI 6.3, 5.2.25.7 (Flush Hint Address Structure)
"""

from pileus.bus import PythonDevice
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class FlushHint(PythonDevice):
    """Calls ``sync``, which raises OSError, on the vCPU's thread: what follows the store may rely on it.

    There is no way to tell a guest that it failed. Rather than let it believe what is not so, the VM stops.
    """

    def __init__(self, name: str, sync: "Callable[[], None]") -> None:
        self.name = name
        self._sync = sync

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        try:
            self._sync()
        except OSError as error:
            raise HostError(f"make the memory of {self.name} durable:", error.strerror) from error

"""The host bridge: a function of its own, and the two ways from ports and memory to configuration space.

Source: PCI Local Bus 3.0, 3.2.2.3.2 (Software Generation of Configuration Transactions); PCI Express Base
3.0, 7.2.2 (Enhanced Configuration Access Mechanism).
"""

from pileus.pci._config import EcamFace, PortsFace
from pileus.pci.config_space import ConfigSpace
from pileus.pci.function import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.pci.bus import PciBus

PORT, PORTS = 0xCF8, 8  # CONFIG_ADDRESS, then CONFIG_DATA
DATA = 4
VENDOR, DEVICE, HOST_BRIDGE_CLASS = 0x8086, 0x0D57, 0x060000  # as in Cloud Hypervisor
ENABLE = 1 << 31
BUS_NUMBER = 0xFF0000
WRITABLE_ADDRESS = ENABLE | 0xFFFFFC
BUS_SIZE = 1 << 20  # bytes of ECAM for each bus


def host_bridge() -> Function:
    """The function of slot 0, which does nothing."""
    return Function("host bridge", ConfigSpace(vendor=VENDOR, device=DEVICE, class_code=HOST_BRIDGE_CLASS))


class ConfigPorts(PortsFace):
    """Configuration mechanism 1: a 32-bit address, then a window of four bytes onto that register."""

    def __init__(self, bus: "PciBus") -> None:
        super().__init__(bus.table)
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        """Of a register that Python has to look at first."""
        return self._bus.read(self._devfn, self._register(offset), size)

    def write(self, offset: int, size: int, value: int) -> None:
        if DATA <= offset <= PORTS - size and self.address & ENABLE and not self.address & BUS_NUMBER:
            self._bus.write(self._devfn, self._register(offset), size, value)

    @property
    def _devfn(self) -> int:
        return self.address >> 8 & 0xFF

    def _register(self, offset: int) -> int:
        return (self.address & 0xFC) + offset - DATA

    def state(self) -> int:
        return self.address

    def restore(self, state: int) -> None:
        self.address = state & WRITABLE_ADDRESS


class Ecam(EcamFace):
    """Configuration space in memory: 4 KiB a function, of which a conventional one has 256 bytes."""

    def __init__(self, bus: "PciBus") -> None:
        super().__init__(bus.table)
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        """Of a register that Python has to look at first."""
        return self._bus.read(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < BUS_SIZE and size <= 4:
            self._bus.write(offset >> 12, offset & 0xFFF, size, value)

"""The host bridge: a function of its own, and the two ways from ports and memory to configuration space.

Source: PCI Local Bus 3.0, 3.2.2.3.2 (Software Generation of Configuration Transactions); PCI Express Base
3.0, 7.2.2 (Enhanced Configuration Access Mechanism).
"""

from pileus.bus import PythonDevice
from pileus.pci.config_space import ConfigSpace
from pileus.pci.function import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.pci.bus import PciBus

PORT, PORTS = 0xCF8, 8  # CONFIG_ADDRESS, CONFIG_DATA
VENDOR, DEVICE, HOST_BRIDGE_CLASS = 0x8086, 0x0D57, 0x060000  # as in Cloud Hypervisor
ENABLE = 1 << 31
WRITABLE_ADDRESS = ENABLE | 0xFFFFFC
BUS_SIZE = 1 << 20  # bytes of ECAM for each bus


def host_bridge() -> Function:
    """The function of slot 0, which does nothing."""
    return Function("host bridge", ConfigSpace(vendor=VENDOR, device=DEVICE, class_code=HOST_BRIDGE_CLASS))


class ConfigPorts(PythonDevice):
    """Configuration mechanism 1: a 32-bit address, then a window of four bytes onto that register."""

    def __init__(self, bus: "PciBus") -> None:
        self._bus = bus
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        address = self._address
        if offset >= 4:
            if address & ENABLE and not address >> 16 & 0xFF and offset + size <= PORTS:
                return self._bus.read(address >> 8 & 0xFF, (address & 0xFC) + offset - 4, size)
        elif offset == 0 and size == 4:
            return address
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        address = self._address
        if offset >= 4:
            if address & ENABLE and not address >> 16 & 0xFF and offset + size <= PORTS:
                self._bus.write(address >> 8 & 0xFF, (address & 0xFC) + offset - 4, size, value)
        elif offset == 0 and size == 4:
            self._address = value & WRITABLE_ADDRESS

    def state(self) -> int:
        return self._address

    def restore(self, state: int) -> None:
        self._address = state & WRITABLE_ADDRESS


class Ecam(PythonDevice):
    """Configuration space in memory: 4 KiB a function, of which a conventional one has 256 bytes."""

    def __init__(self, bus: "PciBus") -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        if offset < BUS_SIZE and size <= 4:
            return self._bus.read(offset >> 12, offset & 0xFFF, size)
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < BUS_SIZE and size <= 4:
            self._bus.write(offset >> 12, offset & 0xFFF, size, value)

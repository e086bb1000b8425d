"""Virtio devices on PCI: a host bridge, then a slot each, in order."""

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi import pci as acpi_pci
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus
from pileus.pci.host_bridge import PORT, PORTS, ConfigPorts, Ecam, host_bridge
from pileus.virtio.pci import PciTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.bus import Bus
    from pileus.cleanup import Cleanup
    from pileus.kvm import Vm
    from pileus.kvm.routing import Routes
    from pileus.memory import GuestMemory
    from pileus.virtio.device import VirtioDevice


class PciDevices:
    """A PCI host on ``ports`` and ``mmio``; ``above_4g`` is the (gpa, size) for 64-bit BARs, if there is one.

    ``aml`` and ``mmconfig`` are what the ACPI tables say of it.
    """

    def __init__(
        self,
        vm: "Vm",
        routes: "Routes",
        ports: "Bus",
        mmio: "Bus",
        memory: "GuestMemory",
        above_4g: tuple[int, int] | None,
        cleanup: "Cleanup",
    ) -> None:
        self._vm = vm
        self._memory = memory
        self._cleanup = cleanup
        self._routes = routes
        below_4g = Window(layout.PCI_MMIO_32BIT, layout.PCI_MMIO_32BIT_SIZE)
        self.bus = PciBus(mmio, below_4g, None if above_4g is None else Window(*above_4g))
        self.bus.add(host_bridge())
        ports.insert(PORT, PORTS, ConfigPorts(self.bus))
        mmio.insert(layout.PCI_MMCONFIG, acpi_pci.mmconfig_size(), Ecam(self.bus))
        self.aml = [acpi_pci.host_bridge(above_4g), acpi_pci.motherboard()]
        self.cmdline: list[str] = []
        self.mmconfig: tuple[int, int] | None = (layout.PCI_MMCONFIG, acpi_pci.LAST_BUS)

    def add(self, device: "VirtioDevice") -> None:
        """Carry ``device`` in the next slot. Raises ConfigError when slots, addresses or GSIs run out."""
        transport = PciTransport(device, self._memory, self._routes, self._vm)
        self._cleanup.own(transport)
        self.bus.add(transport)

"""Virtio devices on PCI: a host bridge, then a slot each, in order."""

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi import pci as acpi_pci
from pileus.cleanup import Cleanup
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus
from pileus.pci.host_bridge import PORT, PORTS, ConfigPorts, Ecam, host_bridge
from pileus.virtio.pci import PciTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.bus import Bus
    from pileus.cleanup import T
    from pileus.kvm import Vm
    from pileus.kvm.routing import Routes
    from pileus.kvm.slots import Slots
    from pileus.memory import GuestMemory
    from pileus.vfio.backend import Backend, Watcher
    from pileus.virtio.device import VirtioDevice
    from pileus.virtio.devices.iommu import IommuDevice
    from pileus.virtio.host_spaces import HostSpace
    from pileus.vm.lines import Lines


class PciDevices:
    """A PCI host on ``ports`` and ``mmio``; ``above_4g`` is the (gpa, size) for 64-bit BARs, if there is one.

    ``aml``, once all devices are there, ``mmconfig`` and ``tables`` are what the ACPI tables say of it.
    Devices that want to be are put behind ``iommu``, which is itself one of those to add.
    """

    def __init__(
        self,
        vm: "Vm",
        routes: "Routes",
        lines: "Lines",
        ports: "Bus",
        mmio: "Bus",
        memory: "GuestMemory",
        above_4g: tuple[int, int] | None,
        cleanup: Cleanup,
        slots: "Slots",
        iommu: "IommuDevice | None" = None,
    ) -> None:
        self.vm = vm
        self._memory = memory
        self._cleanup = cleanup
        self._slots = slots
        self._routes = routes
        self._lines = lines
        self._iommu = iommu
        self._iommu_bdf = 0
        # Closed after all that is behind it: its reset takes away what their queues live on.
        iommu_end = cleanup.own(Cleanup()) if iommu is not None else cleanup
        self._owners = {True: iommu_end, False: cleanup}
        below_4g = Window(layout.PCI_MMIO_32BIT, layout.PCI_MMIO_32BIT_SIZE)
        self.bus = PciBus(mmio, below_4g, None if above_4g is None else Window(*above_4g))
        self.bus.add(host_bridge())
        ports.insert(PORT, PORTS, ConfigPorts(self.bus))
        mmio.insert(layout.PCI_MMCONFIG, acpi_pci.mmconfig_size(), Ecam(self.bus))
        self._above_4g = above_4g
        self._pins: list[tuple[int, int]] = []  # slot, GSI
        self.cmdline: list[str] = []
        self.mmconfig: tuple[int, int] | None = (layout.PCI_MMCONFIG, acpi_pci.LAST_BUS)

    @property
    def aml(self) -> list[bytes]:
        return [acpi_pci.host_bridge(self._above_4g, self._pins), acpi_pci.motherboard()]

    def own(self, thing: "T") -> "T":
        """Close ``thing`` after the devices that are added from now on."""
        return self._cleanup.own(thing)

    def pass_through(self, backend: "Backend", loop: "Watcher", space: "HostSpace | None" = None) -> None:
        """Let the guest have the device of ``backend`` in the next slot. Raises ConfigError likewise.

        ``space`` is what it sees of memory, where it is behind the IOMMU. Raises HostError then.
        """
        from pileus.vfio.function import PassThrough

        try:
            slot = self.bus.free_slot()
        except BaseException:
            backend.close()
            raise
        gsi = layout.GSI_PCI_PIN + slot % layout.PCI_PINS
        function = self._cleanup.own(PassThrough(backend, self._routes, self._lines, self._slots, loop, gsi))
        bdf = self.bus.add(function, slot) << 3
        if space is not None and (iommu := self._iommu) is not None:
            iommu.add_host_device(bdf, backend.name, space)
            self._cleanup.call(lambda: iommu.forget_host_device(bdf))
        function.placed(lambda: self.bus.decode(function))
        if function.gsi is not None:
            self._pins.append((slot, function.gsi))

    def add(self, device: "VirtioDevice") -> None:
        """Carry ``device`` in the next slot. Raises ConfigError when slots, addresses or GSIs run out."""
        transport = PciTransport(device, self._memory, self._routes, self.vm, self._slots)
        self._owners[device is self._iommu].own(transport)
        bdf = self.bus.add(transport) << 3
        if device is self._iommu:
            self._iommu_bdf = bdf
        elif device.behind_iommu and self._iommu is not None:
            self._iommu.add(device, bdf)

    @property
    def tables(self) -> list[bytes]:
        """ACPI tables beside those that every machine has."""
        if self._iommu is None:
            return []
        from pileus.arch.x86_64.acpi import viot

        return [viot.encode(self._iommu_bdf, sorted(self._iommu.core.endpoints))]

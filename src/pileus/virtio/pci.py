"""The PCI transport: a function whose BAR shows the registers of a virtio device, interrupting by MSI-X.

Source: virtio 1.2, 4.1 (Virtio Over PCI Bus); modern interface only.
"""

import os

from pileus import log
from pileus.bus import PythonDevice
from pileus.errors import HostError
from pileus.pci import capability
from pileus.pci.bar import Bar
from pileus.pci.config_space import ConfigSpace
from pileus.pci.function import Function
from pileus.pci.msix import Msix
from pileus.virtio import ids, pci_common
from pileus.virtio.control import Control
from pileus.virtio.pci_common import CommonConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pileus.memory import GuestMemory
    from pileus.memory._window import FileWindow
    from pileus.pci.msix import Routes
    from pileus.virtio.device import State, VirtioDevice

    class Doorbells(Protocol):
        """Who makes a guest's write signal an eventfd: KVM's ioeventfds."""

        def add_ioeventfd(self, fd: int, address: int, size: int, value: int | None = None) -> None: ...
        def remove_ioeventfd(self, fd: int, address: int, size: int, value: int | None = None) -> None: ...

    class Slots(Protocol):
        """Who lets the guest see memory of this process."""

        def insert(self, gpa: int, memory: FileWindow) -> int: ...
        def remove(self, slot: int) -> None: ...


VENDOR, FIRST_DEVICE, REVISION = 0x1AF4, 0x1040, 1
# Ethernet; mass storage of another kind; IOMMU
CLASSES = {ids.NET: 0x020000, ids.BLOCK: 0x018000, ids.IOMMU: 0x080600}
OTHER_CLASS = 0xFFFF00
BELOW_4G = {ids.BLOCK}  # firmware that knows no 64-bit BARs must find its disk

# What BAR 0 shows, and where. Each queue has four bytes of the notify area.
BAR = 0
COMMON = 0x0000
ISR, ISR_SIZE = 0x0100, 4
PBA = 0x0800
CONFIG, CONFIG_SIZE = 0x1000, 0x1000
NOTIFY = 0x2000
TABLE = 0x3000  # in pages of its own: who passes the device on can leave these out
NOTIFY_MULTIPLIER = 4
MAX_QUEUES = (TABLE - NOTIFY) // NOTIFY_MULTIPLIER

COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = range(1, 6)  # 4.1.4: types of capabilities
SHARED_MEMORY_CFG = 8
WINDOW = 2  # the BAR that shared memory has to itself
# The PCI_CFG capability is a window onto the BARs: offsets of its fields, and what a driver may write.
WINDOW_BAR, WINDOW_OFFSET, WINDOW_LENGTH, WINDOW_DATA = 4, 8, 12, 16
WINDOW_WRITABLE = bytes.fromhex("0000 ff000000 ffffffff ffffffff ffffffff")

USED_BUFFER, CONFIG_CHANGE = 1, 2  # ISR
ANY_SIZE = 0  # of a doorbell


class PciTransport(Function):
    """Carries ``device``; add it to a PciBus. Raises ConfigError where interrupts run out."""

    def __init__(
        self,
        device: "VirtioDevice",
        memory: "GuestMemory",
        routes: "Routes",
        doorbells: "Doorbells",
        slots: "Slots | None" = None,
    ) -> None:
        """``slots`` are for the windows of a device that has some."""
        if len(device.queues) > MAX_QUEUES:
            raise ValueError(f"{device.name}: more than {MAX_QUEUES} queues")
        number = FIRST_DEVICE + device.id
        config = ConfigSpace(
            vendor=VENDOR,
            device=number,
            revision=REVISION,
            class_code=CLASSES.get(device.id, OTHER_CLASS),
            subsystem_vendor=VENDOR,
            subsystem=number,
        )
        super().__init__(device.name, config)
        self.device = device
        self.control = Control(device, memory)
        self.msix = Msix(len(device.queues) + 1, routes)
        self._common = CommonConfig(self.control, self.msix)
        self._isr = Isr()
        self._doorbells = doorbells
        self._wired: list[tuple[int, int]] = []  # kick fd, gpa
        self.control.interrupt = self._config_changed
        self.control.forget = self._forget
        self._add_bar()
        self._add_capabilities()
        self._slots = slots
        self._slot: int | None = None  # of the window
        self._add_window()

    def close(self) -> None:
        """Reset, and give back interrupts and doorbells; the device itself is its owner's to close."""
        self.control.reset()
        self._wire(None)
        self._show(None)
        self.msix.close()

    def state(self) -> "State":
        """The function and the device in it, as plain data; no vCPU runs and nothing is in flight."""
        return {
            "control": self.control.state(),
            "vectors": self._common.state(),
            "config_changed": self._isr.config_changed,
            "msix": self.msix.state(),
            "config": self.config.state(),
        }

    def restore(self, state: "State") -> None:
        """Take ``state`` back on a new function; PciBus.decode then puts its BAR where it was.

        Raises ValueError where this device is not what was saved.
        """
        self.config.restore(state["config"])
        self.msix.restore(state["msix"])
        self._isr.config_changed = bool(state["config_changed"])
        self._common.restore(state["vectors"])
        self.control.restore(state["control"])

    def _config_changed(self) -> None:
        self._isr.config_changed = True
        self._common.signal_config()

    def _forget(self) -> None:
        self._isr.config_changed = False
        self._common.forget_vectors()

    def _add_bar(self) -> None:
        msix = self.msix
        sections: list[tuple[int, int, PythonDevice]] = [
            (COMMON, pci_common.SIZE, self._common),
            (ISR, ISR_SIZE, self._isr),
            (PBA, msix.pba_size, msix.pba),
            (CONFIG, CONFIG_SIZE, DeviceConfig(self.device)),
            (NOTIFY, self._notify_size, Notify(self.device)),
            (TABLE, msix.table_size, msix.table),
        ]
        size = 1 << (TABLE + msix.table_size - 1).bit_length()
        self.add_bar(Bar(BAR, size, sections, wide=self.device.id not in BELOW_4G, moved=self._wire))

    @property
    def _notify_size(self) -> int:
        return max(1, len(self.device.queues)) * NOTIFY_MULTIPLIER

    def _add_capabilities(self) -> None:
        self._add_capability(COMMON_CFG, COMMON, pci_common.SIZE)
        self._add_capability(ISR_CFG, ISR, 1)
        self._add_capability(DEVICE_CFG, CONFIG, CONFIG_SIZE)
        self._add_capability(NOTIFY_CFG, NOTIFY, self._notify_size, NOTIFY_MULTIPLIER.to_bytes(4, "little"))
        window = self._add_capability(PCI_CFG, 0, 0, bytes(4), WINDOW_WRITABLE)
        self.config.before_read(window + WINDOW_DATA, 4, lambda _offset, _size: self._window_read(window))
        self.config.after_write(window + WINDOW_DATA, 4, lambda _offset, _size: self._window_write(window))
        self.msix.define(self, BAR, TABLE, PBA)

    def _add_capability(
        self, kind: int, offset: int, length: int, more: bytes = b"", writable: bytes = b""
    ) -> int:
        """4.1.4 (Virtio Structure PCI Capabilities): where it is in configuration space."""
        body = bytes([16 + len(more), kind, BAR, 0, 0, 0])
        body += offset.to_bytes(4, "little") + length.to_bytes(4, "little") + more
        return self.capabilities.add(capability.VENDOR_SPECIFIC, body, writable)

    def _add_window(self) -> None:
        """4.1.4.7 (Shared memory capability): the first region, in a BAR of its own; no device has others."""
        if not self.device.windows:
            return
        size = self.device.windows[0].size
        self.add_bar(Bar(WINDOW, size, [], prefetchable=True, moved=self._show))
        body = (
            bytes([24, SHARED_MEMORY_CFG, WINDOW, 0, 0, 0])
            + bytes(4)
            + (size & 0xFFFFFFFF).to_bytes(4, "little")
        )
        self.capabilities.add(
            capability.VENDOR_SPECIFIC, body + bytes(4) + (size >> 32).to_bytes(4, "little")
        )

    def _show(self, gpa: int | None) -> None:
        """Let the guest see the window where its BAR now is."""
        if self._slots is None or not self.device.windows:
            return
        if self._slot is not None:
            self._slots.remove(self._slot)
            self._slot = None
        if gpa is not None:
            try:
                self._slot = self._slots.insert(gpa, self.device.windows[0])
            except HostError as error:
                log.limited(log.ERROR, f"{self.name}: its window is not to be seen: {error}")

    def _wire(self, gpa: int | None) -> None:
        """Doorbells where BAR 0 now is. One that cannot be had rings by way of the bus."""
        for fd, where in self._wired:
            self._doorbells.remove_ioeventfd(fd, where, ANY_SIZE)
        self._wired.clear()
        if gpa is None:
            return
        for index, queue in enumerate(self.device.queues):
            where = gpa + NOTIFY + NOTIFY_MULTIPLIER * index
            try:
                self._doorbells.add_ioeventfd(queue.kick_fd, where, ANY_SIZE)
            except HostError as error:
                log.limited(log.WARNING, f"{self.name}: queue {index} has no doorbell: {error}")
                return
            self._wired.append((queue.kick_fd, where))

    def _window(self, at: int) -> tuple[Bar, int, int] | None:
        """4.1.4.9: the BAR, offset and size that the capability at ``at`` names, if they are allowed."""
        bar = self.bar(self.config.get(at + WINDOW_BAR, 1))
        offset, size = self.config.get(at + WINDOW_OFFSET, 4), self.config.get(at + WINDOW_LENGTH, 4)
        return None if bar is None or size not in {1, 2, 4} or offset % size else (bar, offset, size)

    def _window_read(self, at: int) -> None:
        if (window := self._window(at)) is not None:
            bar, offset, size = window
            self.config.set(at + WINDOW_DATA, size, bar.load(offset, size))

    def _window_write(self, at: int) -> None:
        if (window := self._window(at)) is not None:
            bar, offset, size = window
            bar.store(offset, size, self.config.get(at + WINDOW_DATA, size))


class Isr(PythonDevice):
    """The ISR status (4.1.4.5). Rings may always have news: a driver that looks in vain loses nothing."""

    def __init__(self) -> None:
        self.config_changed = False

    def read(self, offset: int, size: int) -> int:
        """Reading takes back what it says."""
        if offset:
            return 0
        changed, self.config_changed = self.config_changed, False
        return USED_BUFFER | (CONFIG_CHANGE if changed else 0)


class DeviceConfig(PythonDevice):
    """The device-specific configuration."""

    def __init__(self, device: "VirtioDevice") -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        with self._device.lock:
            return int.from_bytes(self._device.read_config(offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        with self._device.lock:
            self._device.write_config(offset, value.to_bytes(size, "little"))


class Notify(PythonDevice):
    """Kicks of queues whose doorbell KVM does not ring, such as those through the PCI_CFG window."""

    def __init__(self, device: "VirtioDevice") -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        index = offset // NOTIFY_MULTIPLIER
        if index < len(self._device.queues):
            os.eventfd_write(self._device.queues[index].kick_fd, 1)

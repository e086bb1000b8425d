"""Virtio devices without PCI: a page of registers and a pin of the IOAPIC each.

A guest learns of them twice: from ACPI (``LNRO0005``) and from its command line (``virtio_mmio.device=``),
since some kernels know only one of the two. One that knows both finds the second announcement taken.

Source: virtio 1.2, 4.2.1 (MMIO Device Discovery); Linux, drivers/virtio/virtio_mmio.c
"""

import os

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi.aml import device as aml_device
from pileus.arch.x86_64.acpi.aml import name
from pileus.arch.x86_64.acpi.resources import EDGE, SHARED, interrupt, memory32_fixed, resource_template
from pileus.errors import ConfigError
from pileus.virtio.mmio import WINDOW_SIZE, MmioTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.bus import Bus
    from pileus.cleanup import Cleanup
    from pileus.kvm import Vm
    from pileus.kvm.slots import Slots
    from pileus.memory import GuestMemory
    from pileus.memory._window import FileWindow
    from pileus.virtio.device import VirtioDevice
    from pileus.vm.lines import Lines

PINS = layout.IOAPIC_PINS - layout.GSI_FIRST_PIN


class MmioDevices:
    """Puts devices on ``mmio`` one after the other; ``aml`` and ``cmdline`` then say where they are.

    The 20th device shares the pin of the first: interrupts are edges, and each driver looks at its rings.
    """

    def __init__(
        self,
        vm: "Vm",
        lines: "Lines",
        mmio: "Bus",
        memory: "GuestMemory",
        cleanup: "Cleanup",
        slots: "Slots",
        above_4g: "tuple[int, int] | None",
    ) -> None:
        """``above_4g`` is where windows of devices may be: the first of them in ``slots``, and so on."""
        self._vm = vm
        self._lines = lines
        self._mmio = mmio
        self._memory = memory
        self._cleanup = cleanup
        self._slots = slots
        self._free, self._room = above_4g or (0, 0)
        self._count = 0
        self.aml: list[bytes] = []
        self.cmdline: list[str] = []
        self.tables: list[bytes] = []
        self.mmconfig: tuple[int, int] | None = None

    def add(self, device: "VirtioDevice") -> None:
        """Carry ``device``. Raises ConfigError when the window is full."""
        index = self._count
        base = layout.VIRTIO_MMIO + index * WINDOW_SIZE
        if base >= layout.VIRTIO_MMIO + layout.VIRTIO_MMIO_SIZE:
            most = layout.VIRTIO_MMIO_SIZE // WINDOW_SIZE
            raise ConfigError("--pci", "off", f"allows at most {most} devices")
        gsi = layout.GSI_FIRST_PIN + index % PINS
        self._count += 1
        call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._cleanup.call(lambda: os.close(call_fd))
        self._lines.add_irqfd(call_fd, gsi)
        transport = MmioTransport(device, self._memory, call_fd)
        self._cleanup.call(transport.control.reset)
        transport.wire(self._vm, base)
        if device.windows:
            transport.window = self._show(device.windows[0])
        self._mmio.insert(base, WINDOW_SIZE, transport)
        resources = resource_template(memory32_fixed(base, WINDOW_SIZE), interrupt(gsi, EDGE | SHARED))
        self.aml.append(
            aml_device(
                f"V{index:03X}",
                name("_HID", "LNRO0005"),
                name("_UID", index),
                name("_CCA", 1),
                name("_CRS", resources),
            )
        )
        self.cmdline.append(f"virtio_mmio.device=4K@{base:#x}:{gsi}")

    def _show(self, window: "FileWindow") -> tuple[int, int]:
        """Let the guest see ``window``; where, and how large. Raises ConfigError."""
        gpa = -(-self._free // window.size) * window.size
        self._room -= gpa + window.size - self._free
        if self._room < 0:
            raise ConfigError(
                "--fs", f"cache_size {window.size}", "the guest's address space has no room for it"
            )
        self._free = gpa + window.size
        slot = self._slots.insert(gpa, window)
        self._cleanup.call(lambda: self._slots.remove(slot))
        return gpa, window.size

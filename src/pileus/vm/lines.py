"""Interrupt lines: what a device with a pin is given, whichever controllers the machine has.

A kvm.Vm with all controllers in the kernel is ``Lines`` by itself. ``SplitLines`` is the same over an IOAPIC
of our own: an edge is an irqfd on the pin's GSI all the same, which KVM delivers without us, as the message
that the guest wrote into the IOAPIC. A level-triggered irqfd is read by the control loop, since KVM offers
none (KVM_IRQFD_FLAG_RESAMPLE) without an IOAPIC of its own.

Source: Linux, Documentation/virt/kvm/api.rst, 4.75 (KVM_IRQFD), 7.5 (KVM_CAP_SPLIT_IRQCHIP)
"""

import _thread
import os
import select

from pileus.arch.x86_64 import layout
from pileus.devices.ioapic import PINS, WINDOW_SIZE, Ioapic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from pileus.bus import Bus
    from pileus.kvm import Vm
    from pileus.kvm.routing import Routes
    from pileus.vm.vm import Loop

    class Lines(Protocol):
        """Pins of the IOAPIC, by their GSIs. Raise KvmError where KVM refuses. Any thread may call."""

        def add_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
            """A write to eventfd ``fd`` raises ``gsi``: an edge, or with ``resample_fd`` a level, until the
            guest's end of interrupt, which is then written to that."""

        def remove_irqfd(self, fd: int, gsi: int) -> None:
            """``fd`` means nothing any more."""

        def set_irq_line(self, gsi: int, level: bool) -> None:
            """Assert ``gsi``, or no longer."""


assert PINS == layout.IOAPIC_PINS


class SplitLines:
    """Lines to an IOAPIC on ``mmio``. ``routes`` are the GSIs of ``vm``, its pins among them."""

    def __init__(self, vm: "Vm", routes: "Routes", mmio: "Bus", loop: "Loop") -> None:
        self._vm = vm
        self._routes = routes
        self._loop = loop
        self._levels: dict[int, tuple[int, int]] = {}  # fd -> GSI, resample fd
        self._lock = _thread.allocate_lock()  # taken inside the IOAPIC's, never around it
        self.ioapic = Ioapic(self)
        mmio.insert(layout.IOAPIC, WINDOW_SIZE, self.ioapic)

    # Lines

    def add_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
        if resample_fd is None:
            self._vm.add_irqfd(fd, gsi)
            return
        with self._lock:
            self._levels[fd] = (gsi, resample_fd)
        self._loop.watch(fd, select.EPOLLIN, lambda _events: self._raised(fd))

    def remove_irqfd(self, fd: int, gsi: int) -> None:
        with self._lock:
            level = self._levels.pop(fd, None)
            shared = any(other == gsi for other, _ in self._levels.values())
        if level is None:
            self._vm.remove_irqfd(fd, gsi)
            return
        self._loop.unwatch(fd)
        if not shared:
            self.ioapic.unlatch(gsi)

    def set_irq_line(self, gsi: int, level: bool) -> None:
        self.ioapic.set_line(gsi, level)

    def _raised(self, fd: int) -> None:
        """On the control loop; a vCPU may have removed ``fd`` meanwhile."""
        with self._lock:
            gsi, _ = self._levels.get(fd, (None, None))
            if gsi is None:
                return
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
        self.ioapic.latch(gsi)

    # Messages of the IOAPIC

    def route(self, messages: "Mapping[int, tuple[int, int] | None]") -> None:
        self._routes.set_all(messages)

    def signal(self, address: int, data: int) -> bool:
        return self._routes.signal(address, data)

    def ended(self, pin: int) -> None:
        with self._lock:
            for gsi, resample_fd in self._levels.values():
                if gsi == pin:
                    os.eventfd_write(resample_fd, 1)

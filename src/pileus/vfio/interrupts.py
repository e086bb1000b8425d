"""The interrupts of a device that passes through: one kind at a time, eventfd to irqfd, never through us.

A driver chooses MSI-X or MSI in configuration space; with neither, the device's pin is in force, if there
is one.

Source: PCI Local Bus 3.0, 6.8 (Message Signaled Interrupts)
"""

import os
import select

from pileus import log
from pileus.errors import KvmError
from pileus.pci import capability
from pileus.pci.capability import HEADER_SIZE
from pileus.pci.msix import ENABLE, ENTRY_RESET, MASKED, Msix, Vector
from pileus.vfio import abi
from pileus.vfio.config import MSI_64BIT, MSI_MASKING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.vfio.backend import Backend, Messages, Pins, Watcher
    from pileus.vfio.config import PassThroughConfig

MSI_ENABLE, MSI_CAPABLE_SHIFT, MSI_CHOSEN, MSI_CHOSEN_SHIFT = 1 << 0, 1, 0x70, 4
MAX_MSI = 32
EVENTFD_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class Pin:
    """INTx, level-triggered: the device masks itself with each interrupt, and the guest's end of interrupt,
    which KVM writes to an eventfd, unmasks it again."""

    def __init__(self, backend: "Backend", pins: "Pins", watcher: "Watcher", gsi: int) -> None:
        self.gsi = gsi
        self._backend = backend
        self._pins = pins
        self._watcher = watcher
        self._fds: list[int] = []  # that the device writes; that KVM writes

    def enable(self) -> None:
        fds = [os.eventfd(0, EVENTFD_FLAGS), os.eventfd(0, EVENTFD_FLAGS)]
        try:
            self._pins.add_irqfd(fds[0], self.gsi, fds[1])
        except KvmError as error:
            log.error(f"{self._backend.name}: its pin interrupts nobody: {error}")
            for fd in fds:
                os.close(fd)
            return
        self._fds = fds
        self._backend.set_eventfds(abi.INTX, [fds[0]])
        if not self._backend.unmask_by(fds[1]):
            self._watcher.watch(fds[1], select.EPOLLIN, self._resampled)

    def disable(self) -> None:
        if not self._fds:
            return
        call, resample = self._fds
        self._fds = []
        self._watcher.unwatch(resample)
        self._backend.set_eventfds(abi.INTX, [])
        self._pins.remove_irqfd(call, self.gsi)
        os.close(call)
        os.close(resample)

    def _resampled(self, _events: int) -> None:
        """On the control loop, with the pin perhaps disabled by a vCPU meanwhile."""
        fds = self._fds
        if not fds:
            return
        try:
            os.eventfd_read(fds[1])
        except OSError:
            return
        self._backend.unmask()


class Msi:
    """The capability at ``offset`` of ``config``, for up to ``most`` vectors. ``changed()`` is called when
    its control word was written.

    Vectors live from when they are enabled: unlike those of MSI-X, they are numbers of one message.
    """

    def __init__(
        self,
        config: "PassThroughConfig",
        offset: int,
        most: int,
        routes: "Messages",
        changed: "Callable[[], None]",
    ) -> None:
        self._config = config
        self._control = offset + HEADER_SIZE
        self._routes = routes
        self.vectors: list[Vector] = []
        control = config.get(self._control, 2)
        possible = min(most, 1 << (control >> MSI_CAPABLE_SHIFT & 7), MAX_MSI)
        log2 = possible.bit_length() - 1
        control = control & (MSI_64BIT | MSI_MASKING) | log2 << MSI_CAPABLE_SHIFT
        config.set(self._control, 2, control)
        wide = bool(control & MSI_64BIT)
        self._address, self._data = self._control + 2, self._control + (10 if wide else 6)
        self._wide = wide
        self._mask = self._data + 4 if control & MSI_MASKING else None
        self._most = 1 << log2
        config.own(self._control, 2, MSI_ENABLE | MSI_CHOSEN)
        config.own(self._address, 8 if wide else 4, (1 << (64 if wide else 32)) - 4)
        config.own(self._data, 2, 0xFFFF)
        config.after_write(
            self._address, self._data + 2 - self._address, lambda _offset, _size: self._update()
        )
        if self._mask is not None:
            config.set(self._mask, 8, 0)
            config.own(self._mask - 2, 2)
            config.own(self._mask, 8, (1 << self._most) - 1)
            config.after_write(self._mask, 4, lambda _offset, _size: self._update())
            config.before_read(self._mask + 4, 4, lambda _offset, _size: self._show_pending())
        config.after_write(self._control, 2, lambda _offset, _size: changed())

    @property
    def enabled(self) -> int:
        """How many vectors the driver wants now."""
        control = self._config.get(self._control, 2)
        return (
            min(self._most, 1 << ((control & MSI_CHOSEN) >> MSI_CHOSEN_SHIFT)) if control & MSI_ENABLE else 0
        )

    def open(self) -> list[int]:
        """The eventfds of as many vectors as are wanted, attached where they are not masked."""
        while len(self.vectors) < self.enabled:
            self.vectors.append(Vector(os.eventfd(0, EVENTFD_FLAGS), self._routes.allocate()))
        self._update()
        return [vector.fd for vector in self.vectors]

    def close(self) -> None:
        for vector in self.vectors:
            if vector.attached:
                self._routes.detach(vector.fd, vector.gsi)
            self._routes.free(vector.gsi)
            os.close(vector.fd)
        self.vectors.clear()

    def _update(self) -> None:
        config = self._config
        address, data = config.get(self._address, 8 if self._wide else 4), config.get(self._data, 2)
        masks = 0 if self._mask is None else config.get(self._mask, 4)
        for index, vector in enumerate(self.vectors):
            live = not masks >> index & 1
            if live:
                self._routes.set(vector.gsi, address, data & ~(len(self.vectors) - 1) | index)
            if live != vector.attached:
                (self._routes.attach if live else self._routes.detach)(vector.fd, vector.gsi)
                vector.attached = live

    def _show_pending(self) -> None:
        assert self._mask is not None
        waiting = 0
        for index, vector in enumerate(self.vectors):
            if not vector.attached and select.select([vector.fd], [], [], 0)[0]:
                waiting |= 1 << index
        self._config.set(self._mask + 4, 4, waiting)


class DeviceMsix(Msix):
    """Tells ``changed()`` when the driver enables or disables it as a whole."""

    def __init__(self, count: int, routes: "Messages", changed: "Callable[[], None]") -> None:
        self.enabled = False
        self._changed = changed
        super().__init__(count, routes)

    def set_control(self, value: int) -> None:
        super().set_control(value)
        self.enabled = bool(value & ENABLE)
        self._changed()

    def reset(self) -> None:
        """All vectors masked, and none enabled."""
        for at in range(0, self.table_size, 4):
            self.write_table(at, 4, MASKED if at % len(ENTRY_RESET) == len(ENTRY_RESET) - 4 else 0)
        self.set_control(0)


class Interrupts:
    """Keeps one kind in force: what ``config`` says."""

    def __init__(
        self,
        backend: "Backend",
        config: "PassThroughConfig",
        routes: "Messages",
        pin: Pin | None,
    ) -> None:
        self._backend = backend
        self._config = config
        self._pin = pin
        self._in_force: tuple[int, int] | None = None  # kind, and how many
        self.msi: Msi | None = None
        self.msix: DeviceMsix | None = None
        if (at := config.found.get(capability.MSI)) is not None:
            self.msi = Msi(config, at, backend.irqs[abi.MSI], routes, self.update)
        if (at := config.found.get(capability.MSIX)) is not None:
            self.msix = self._make_msix(at + HEADER_SIZE, routes)

    def update(self) -> None:
        """What is in force is what the driver chose."""
        wanted = self._wanted()
        if wanted == self._in_force:
            return
        self._leave()
        self._in_force = wanted
        if wanted is None:
            return
        kind, _ = wanted
        if kind == abi.INTX and self._pin is not None:
            self._pin.enable()
        elif kind == abi.MSI and self.msi is not None:
            self._backend.set_eventfds(abi.MSI, self.msi.open())
        elif self.msix is not None:
            self._backend.set_eventfds(abi.MSIX, [vector.fd for vector in self.msix.vectors])

    def reset(self) -> None:
        """The device was reset, and its configuration space too."""
        if self.msix is not None:
            self.msix.reset()
        self.update()

    def close(self) -> None:
        self._leave()
        if self.msix is not None:
            self.msix.close()

    def _wanted(self) -> tuple[int, int] | None:
        if self.msix is not None and self.msix.enabled:
            return abi.MSIX, len(self.msix.vectors)
        if self.msi is not None and self.msi.enabled:
            return abi.MSI, self.msi.enabled
        return None if self._pin is None else (abi.INTX, 1)

    def _leave(self) -> None:
        if self._in_force is None:
            return
        kind, _ = self._in_force
        self._in_force = None
        if kind == abi.INTX and self._pin is not None:
            self._pin.disable()
            return
        self._backend.set_eventfds(kind, [])
        if kind == abi.MSI and self.msi is not None:
            self.msi.close()

    def _make_msix(self, control: int, routes: "Messages") -> DeviceMsix:
        config = self._config
        count = min((config.get(control, 2) & 0x7FF) + 1, self._backend.irqs[abi.MSIX])
        config.set(control, 2, count - 1)
        config.own(control, 2, 0xC000)
        config.own(control + 2, 8)
        msix = DeviceMsix(count, routes, self.update)
        config.after_write(control, 2, lambda _offset, _size: msix.set_control(config.get(control, 2)))
        return msix

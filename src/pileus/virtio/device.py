"""The face of a virtio device: features, config space, queues, activate and reset.

A device never knows which transport carries it. One in plain Python overrides ``handle_queue``; one with
compiled queues overrides ``activate`` and ``reset`` to start and end its engines.
"""

import _thread
import os

from pileus import log
from pileus.errors import PileusError
from pileus.virtio.queue import RING_FEATURES, Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from pileus.memory import GuestMemory, Translation
    from pileus.memory._window import FileWindow

    class Mapper(Protocol):
        """Who makes files appear in regions of ``shared_memory``. Raises OSError."""

        def map(self, region: int, fd: int, at: int, offset: int, length: int, writable: bool) -> None: ...
        def unmap(self, region: int, offset: int, length: int) -> None: ...

    State = Mapping[str, Any]

VERSION_1 = 1 << 32  # no legacy interface
ACCESS_PLATFORM = 1 << 33  # addresses go through a virtual IOMMU
ALL_BYTES = (1 << 64) - 1


class VirtioDevice:
    """One device. Subclasses set ``id``, ``queue_sizes`` and ``features``, and keep ``config`` up to date.

    ``lock`` is held around every call from a driver (a vCPU's thread), from a kick and from the control loop.
    """

    id = 0
    features = 0  # offered beside those of ring and transport
    queue_sizes: tuple[int, ...] = ()  # the most descriptors of each queue, a power of two
    in_order = False  # chains are given back in the order of their offer, always
    shared_memory: "tuple[int, ...]" = ()  # bytes of each region that driver and device see, by number
    kicked_in_python: "tuple[int, ...] | None" = None  # queues that handle_queue serves; None: all

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = _thread.RLock()
        self.queues: list[Queue] = [Queue(size) for size in self.queue_sizes]
        self.config = b""  # device-specific configuration, as the driver reads it
        self.config_generation: int = 0
        self.driver_features = 0  # what was negotiated, once the driver said FEATURES_OK
        self.memory: GuestMemory | None = None  # while active
        self.behind_iommu = False  # whether it is to be
        self.iommu: Translation | None = None  # what its addresses go through; set before a driver comes
        self.paused = False  # the VM is; what the driver kicks, if anything, waits
        self._waiting: set[int] = set()  # queues that were kicked meanwhile
        self.failed = False  # the driver broke a rule, and nothing is served until its reset
        self.changed: Callable[[], None] = _nothing  # the transport's: interrupts for a new configuration
        self.broke: Callable[[], None] = _nothing  # the transport's: sets NEEDS_RESET
        self.windows: tuple[FileWindow, ...] = ()  # shared_memory, where this process shows it to the guest
        self.mapper: Mapper | None = None  # of shared_memory; None where there is none for this driver
        self.noticed: Callable[[str], None] = _nothing_of  # the VMM's: hears of its life, in a word

    # -- what a device overrides ------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        """Serve the chains on queue ``index``, on the control loop. A PileusError stops the device."""

    def activate(self) -> None:
        """The driver is ready: features and queues stand, and ``memory`` is set."""

    def reset(self) -> None:
        """Touch neither queues nor guest memory from here on; called before the queues are reset."""

    def pause(self) -> None:
        """Leave guest memory alone from when this returns until ``resume``; queues stay as they are.

        The VM's vCPUs are out of the guest. A device with compiled queues stops its engines, too.
        """
        with self.lock:
            self.paused = True

    def resume(self) -> None:
        """Go on, also with what was kicked meanwhile."""
        with self.lock:
            self.paused = False
            waiting, self._waiting = self._waiting, set()
            for index in sorted(waiting):
                self.kicked(index)

    def counters(self) -> "dict[str, int]":
        """What the device counted so far, by name."""
        return {}

    def call_changed(self, index: int) -> None:
        """The driver chose another interrupt for queue ``index``, which may be active."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes configuration; a device without writable fields ignores it."""

    def state(self) -> "State":
        """What is to be restored, beside features and queues."""
        return {}

    def restore(self, state: "State") -> None:
        """Take ``state`` back."""

    def close(self) -> None:
        """Give back what the host lent. The device is reset by then."""
        for queue in self.queues:
            queue.close()

    # -- what transports and the builder use ------------------------------------------------------

    @property
    def offered(self) -> int:
        """All feature bits the driver may choose from."""
        return self.features | RING_FEATURES | self.required

    @property
    def required(self) -> int:
        """Those that it must choose: behind an IOMMU a driver must know that there is one."""
        return VERSION_1 | (0 if self.iommu is None else ACCESS_PLATFORM)

    @property
    def queue_groups(self) -> int:
        """How many queues there are, in the unit in which this kind of device is given more of them."""
        return len(self.queues)

    @property
    def python_queues(self) -> "tuple[int, ...]":
        """The queues whose kicks the control loop serves."""
        return tuple(range(len(self.queues))) if self.kicked_in_python is None else self.kicked_in_python

    def read_config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the configuration; zeroes where there is none."""
        return self.config[offset : offset + size].ljust(size, b"\0")

    def kicked(self, index: int) -> None:
        """Serve queue ``index``, whose kick fd was readable."""
        with self.lock:
            if self.paused:
                self._waiting.add(index)
                return
            if self.memory is None or self.failed or not self.queues[index].active:
                return
            try:
                self.handle_queue(index)
            except PileusError as error:
                self.fail(str(error))
            self.queues[index].notify()  # of what was served before an error, too

    def serve_again(self, index: int) -> None:
        """Kick queue ``index`` ourselves: there is more to do, and others on the control loop come first."""
        os.eventfd_write(self.queues[index].kick_fd, 1)

    def reconfigure(self, config: bytes) -> None:
        """Change the configuration and tell the driver."""
        with self.lock:
            self.config = config
            self.config_generation = (self.config_generation + 1) & 0xFFFFFFFF
            self.changed()

    def fail(self, reason: str) -> None:
        """Stop for a driver that broke the rules: it has to reset the device. From any thread."""
        self.failed = True
        log.limited(log.WARNING, f"{self.name}: {reason}; it needs a reset")
        self.broke()


def _nothing() -> None:
    pass


def _nothing_of(_: str) -> None:
    pass

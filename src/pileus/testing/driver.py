"""A driver in memory: real rings in real guest memory, and registers as a transport would write them."""

import os
import select
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pileus.memory import GuestMemory
from pileus.memory._iommu import Endpoint
from pileus.testing.memory import MIB, Heap, Scrambled, make_memory
from pileus.testing.ring import Ring, Used
from pileus.virtio import status
from pileus.virtio.control import WORD, Control
from pileus.virtio.device import VirtioDevice
from pileus.virtio.queue._queue import F_EVENT_IDX, F_INDIRECT_DESC

if TYPE_CHECKING:
    from pileus.virtio.device import State

TIMEOUT = 10.0  # seconds after which something will not happen any more


class FakeDriver:
    """Drives ``device``, from its reset to DRIVER_OK, and then whatever a test asks for.

    It takes all ``features`` offered unless told which (VERSION_1 comes by itself), and uses EVENT_IDX unless
    ``event_idx`` is false. ``queue_sizes`` makes rings smaller than the device's limit; queues that are 0
    there stay disabled. RAM is at ``ranges``, of which rings and buffers take the first; or in ``memory``,
    which stays the caller's. ``close`` closes the device too.

    A device whose ``iommu`` is an Endpoint gets IOVAs: the first region's pages, mapped in another order
    (``scrambled``).

    Queues whose kicks the device serves in Python are served by ``kick`` before it returns; for those of an
    engine, ``wait`` until they have been.
    """

    RAM_SIZE = 16 * MIB  # from 0: what follows is a hole
    HIGH_RAM = 1 << 32  # a second region, of HIGH_RAM_SIZE
    HIGH_RAM_SIZE = 1 * MIB

    def __init__(
        self,
        device: VirtioDevice,
        *,
        features: int | None = None,
        event_idx: bool = True,
        queue_sizes: Sequence[int] | None = None,
        ranges: Iterable[tuple[int, int]] | None = None,
        memory: GuestMemory | None = None,
        shared: bool = False,
        start: bool = True,
    ) -> None:
        self.device = device
        self.memory = memory or make_memory(
            ranges or [(0, self.RAM_SIZE), (self.HIGH_RAM, self.HIGH_RAM_SIZE)], shared
        )
        self._owns_memory = memory is None
        self.scrambled = Scrambled(self.memory) if isinstance(device.iommu, Endpoint) else None
        self._map(device)
        self.queue_sizes = list(queue_sizes or device.queue_sizes)
        self.rings: list[Ring] = []
        self.features = 0  # negotiated
        self.config_interrupts = 0
        self._calls = [0] * len(device.queues)
        self._call_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queues]
        self._wanted = features
        self._event_idx = event_idx
        self.control = Control(device, self.memory)
        self.control.interrupt = self._config_changed
        if start:
            self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset and close the device, and give all back. Closing twice is harmless."""
        if self._call_fds:
            self.control.reset()
            self.device.close()
            for fd in self._call_fds:
                os.close(fd)
            self._call_fds = []
            if self._owns_memory:
                self.memory.close()

    def _map(self, device: VirtioDevice) -> None:
        if self.scrambled is not None and isinstance(device.iommu, Endpoint):
            self.scrambled.map(device.iommu)

    def _config_changed(self) -> None:
        self.config_interrupts += 1

    # -- life -------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return self.control.status

    @property
    def offered(self) -> int:
        """The features that the device offers, as read through the registers."""
        return sum(self._offered_word(select) << 32 * select for select in (0, 1))

    def _offered_word(self, select: int) -> int:
        self.control.device_features_select = select
        return self.control.device_features

    def start(self) -> None:
        """Reset, negotiate, set the queues up, and DRIVER_OK. Any number of times."""
        self.negotiate()
        self.set_up_queues()
        self.control.set_status(self.status | status.DRIVER_OK)
        self.serve()

    def reset(self) -> None:
        """Write 0 to the status. The rings stay where they were, which nobody reads any more."""
        self.control.set_status(0)

    def move(self, device: VirtioDevice, state: "State") -> None:
        """Go on with ``device``, restored from ``state``, as after a migration; close the old one.

        Nothing but the device changes: rings, memory and what is in flight stay.
        """
        old, self.device = self.device, device
        if old is not device:
            self.control.reset()
            old.close()
            self._map(device)
        self.control = Control(device, self.memory)
        self.control.interrupt = self._config_changed
        for queue, fd in zip(device.queues, self._call_fds, strict=True):
            queue.call_fd = fd
        self.control.restore(state)
        self.serve()

    def negotiate(self) -> None:
        """From reset to FEATURES_OK."""
        self.reset()
        self.control.set_status(status.ACKNOWLEDGE)
        self.control.set_status(status.ACKNOWLEDGE | status.DRIVER)
        wanted = self.offered if self._wanted is None else self._wanted | 1 << 32
        if not self._event_idx:
            wanted &= ~F_EVENT_IDX
        self.write_features(wanted)
        self.control.set_status(self.status | status.FEATURES_OK)
        assert self.status & status.FEATURES_OK, f"the device refuses features {wanted:#x}"
        self.features = wanted

    def write_features(self, bits: int) -> None:
        for word in (0, 1):
            self.control.driver_features_select = word
            self.control.driver_features = bits >> 32 * word & WORD

    def set_up_queues(self) -> None:
        """Rings in memory, told to the device queue by queue."""
        heap = Heap(self.scrambled or self.memory, *self._heap_range())
        self.rings = []
        for index, size in enumerate(self.queue_sizes):
            ring = Ring(heap, size or 1, bool(self.features & F_EVENT_IDX))
            self.rings.append(ring)
            if size:
                self.set_up_queue(index, ring)

    def set_up_queue(self, index: int, ring: Ring) -> None:
        control = self.control
        control.queue_select = index
        control.set_queue_size(ring.size)
        for which, gpa in (
            ("descriptors", ring.descriptors),
            ("available", ring.available),
            ("used", ring.used_ring),
        ):
            control.set_queue_address(which, False, gpa & WORD)
            control.set_queue_address(which, True, gpa >> 32)
        self.device.queues[index].call_fd = self._call_fds[index]
        control.enable_queue()

    def _heap_range(self) -> tuple[int, int]:
        """Of the first region all but a page at each end, which stay free for what a test puts there."""
        gpa, size = self.memory.ranges[0]
        return gpa + 0x1000, size - 0x2000

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        queue: int = 0,
        indirect: bool = False,
    ) -> int:
        """Offer a chain: buffers that the device reads, then buffers for it to write; returns its head."""
        if indirect:
            assert self.features & F_INDIRECT_DESC, "indirect descriptors were not negotiated"
        return self.rings[queue].add(readable, writable, indirect)

    def kick(self, queue: int = 0) -> None:
        """Ring the doorbell, whether the device asked for that or not."""
        self.rings[queue].kicked_at = self.rings[queue].next_available
        os.eventfd_write(self.device.queues[queue].kick_fd, 1)
        self.serve()

    def kick_if_wanted(self, queue: int = 0) -> bool:
        """As a driver does: ring the doorbell if the device asked to hear of what was offered."""
        wanted = self.rings[queue].wants_kick
        if wanted:
            self.kick(queue)
        return wanted

    def serve(self) -> None:
        """What the control loop does: serve the queues of the device's Python part that were kicked."""
        while kicked := [index for index in self.device.python_queues if self._take_kick(index)]:
            for index in kicked:
                self.device.kicked(index)

    def _take_kick(self, queue: int) -> bool:
        try:
            return os.eventfd_read(self.device.queues[queue].kick_fd) > 0
        except BlockingIOError:
            return False

    def used(self, queue: int = 0) -> list[Used]:
        """What the device gave back since the last call."""
        return self.rings[queue].take_used()

    def wait(self, queue: int = 0, count: int = 1, timeout: float = TIMEOUT) -> list[Used]:
        """Sleep until ``count`` chains have come back, by the interrupts; fails after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._call_fds[queue], select.POLLIN)
        taken = self.used(queue)
        while len(taken) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(taken)} of {count} chains came back, status {self.status:#x}"
            if poll.poll(left * 1000):
                self.calls(queue)
            taken += self.used(queue)
        return taken

    def read(self, head: int, queue: int = 0) -> bytes:
        """What the writable buffers of a chain hold."""
        return self.rings[queue].read(head)

    def calls(self, queue: int = 0) -> int:
        """Interrupts of ``queue`` so far."""
        try:
            self._calls[queue] += os.eventfd_read(self._call_fds[queue])
        except BlockingIOError:
            pass
        return self._calls[queue]

    @property
    def interrupts(self) -> int:
        """Interrupts of all queues so far."""
        return sum(map(self.calls, range(len(self._calls))))

    # -- misconduct -------------------------------------------------------------------------------

    def write_descriptor(
        self, index: int, gpa: int = 0, length: int = 0, flags: int = 0, next: int = 0, queue: int = 0
    ) -> None:
        self.rings[queue].write_descriptor(index, gpa, length, flags, next)

    def offer(self, head: int, queue: int = 0) -> None:
        """Put any number into the available ring."""
        self.rings[queue].offer(head)

    # -- configuration ----------------------------------------------------------------------------

    def read_config(self, offset: int = 0, size: int | None = None) -> bytes:
        """``size`` bytes of the device's configuration, or all of it."""
        return self.device.read_config(offset, len(self.device.config) if size is None else size)

    def write_config(self, offset: int, data: bytes) -> None:
        with self.device.lock:
            self.device.write_config(offset, data)

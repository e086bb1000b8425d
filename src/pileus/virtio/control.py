"""What a driver sees of any virtio device, whichever transport carries it: status, features, queue set-up.

A transport is a table of registers over this. Drivers call from vCPU threads, one at a time by ``lock``.

Source: virtio 1.2, 2.1 to 2.6 and 3.1 (Device Initialization)
"""

import os

from pileus.errors import PileusError
from pileus.virtio import status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.memory import GuestMemory
    from pileus.virtio.device import State, VirtioDevice
    from pileus.virtio.queue import Queue

WORD = (1 << 32) - 1
ADDRESSES = ("descriptors", "available", "used")


class Control:
    """The driver-visible side of ``device``, whose rings are in ``memory``.

    The transport sets ``interrupt``, called to tell the driver of a new configuration, and ``forget``,
    called when a reset makes the driver's interrupt set-up void.
    """

    def __init__(self, device: "VirtioDevice", memory: "GuestMemory") -> None:
        self.device: VirtioDevice = device
        self.memory = memory
        self.device_features_select = 0
        self.driver_features_select = 0
        self.queue_select: int = 0
        self.interrupt: Callable[[], None] = lambda: None
        self.forget: Callable[[], None] = lambda: None
        self._accepted = 0
        self._status = 0  # as the driver wrote it
        device.changed = self._changed
        device.broke = self._changed

    # -- features ---------------------------------------------------------------------------------

    @property
    def device_features(self) -> int:
        """The 32 bits of the offered features that device_features_select names."""
        select = self.device_features_select
        return self.device.offered >> (32 * select) & WORD if select < 2 else 0

    @property
    def driver_features(self) -> int:
        """The 32 accepted bits that driver_features_select names."""
        select = self.driver_features_select
        return self._accepted >> (32 * select) & WORD if select < 2 else 0

    @driver_features.setter
    def driver_features(self, bits: int) -> None:
        select = self.driver_features_select
        if not self.status & status.FEATURES_OK:
            if select < 2:
                self._accepted = self._accepted & ~(WORD << 32 * select) | (bits & WORD) << 32 * select
            elif bits:
                self._accepted |= 1 << 64  # nobody offered that

    # -- status -----------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """What the driver wrote, as far as it counts; and NEEDS_RESET, which any thread may set."""
        return self._status | (status.NEEDS_RESET if self.device.failed else 0)

    def set_status(self, written: int) -> None:
        """The driver writes the status; 0 resets, and has when this returns."""
        with self.device.lock:
            if written == 0:
                was_active = self.device.memory is not None
                self.reset()
                if was_active:
                    self.device.noticed("reset")
                return
            after = status.step(self._status, written)
            if after & ~self._status & status.FEATURES_OK and not self._features_acceptable():
                after &= ~(status.FEATURES_OK | status.DRIVER_OK)
            started = after & ~self._status & status.DRIVER_OK
            if after & status.FEATURES_OK:
                self.device.driver_features = self._accepted
            self._status = after
            if started:
                self._activate()

    def reset(self) -> None:
        """To the state of before the driver came."""
        device = self.device
        with device.lock:
            if device.memory is not None:
                device.reset()
                device.memory = None
            for queue in device.queues:
                queue.call_fd = -1
                queue.reset()
            self._status = self._accepted = device.driver_features = 0
            device.failed = False
            self.device_features_select = self.driver_features_select = self.queue_select = 0
            self.forget()

    def _features_acceptable(self) -> bool:
        return not (self._accepted & ~self.device.offered or self.device.required & ~self._accepted)

    def _activate(self) -> None:
        device = self.device
        try:
            for queue in device.queues:
                if queue.enabled:
                    queue.activate(self.memory, self._accepted, device.iommu)
            device.memory = self.memory
            device.activate()
        except PileusError as error:
            device.fail(str(error))
            return
        for queue in device.queues:
            if queue.active:
                # A driver may have filled it, and even kicked, before it said DRIVER_OK.
                os.eventfd_write(queue.kick_fd, 1)
        device.noticed("activated")

    def _changed(self) -> None:
        if self._status & status.DRIVER_OK:
            self.interrupt()

    # -- queues -----------------------------------------------------------------------------------

    @property
    def queue(self) -> "Queue | None":
        """The selected queue, None for one that does not exist."""
        queues = self.device.queues
        return queues[self.queue_select] if self.queue_select < len(queues) else None

    def configurable(self) -> "Queue | None":
        """The selected queue, while its set-up may change."""
        queue = self.queue
        return None if queue is None or queue.enabled or self.status & status.DRIVER_OK else queue

    def set_queue_size(self, size: int) -> None:
        if (queue := self.configurable()) is not None:
            queue.size = size & 0xFFFF

    def enable_queue(self) -> None:
        if (queue := self.configurable()) is not None:
            queue.enabled = True

    def disable_queue(self) -> None:
        """Before DRIVER_OK a driver may think better of it."""
        if (queue := self.queue) is not None and not self.status & status.DRIVER_OK:
            queue.enabled = False

    def queue_address(self, which: str, high: bool) -> int:
        """Half of an address of ADDRESSES of the selected queue."""
        if (queue := self.queue) is None:
            return 0
        return int(getattr(queue, which)) >> (32 if high else 0) & WORD

    def set_queue_address(self, which: str, high: bool, value: int) -> None:
        if (queue := self.configurable()) is not None:
            shift = 32 if high else 0
            setattr(queue, which, getattr(queue, which) & ~(WORD << shift) | (value & WORD) << shift)

    # -- saving -----------------------------------------------------------------------------------

    def state(self) -> "State":
        """All that the driver set up, with the device's own state; the VM and the device are paused."""
        device = self.device
        with device.lock:
            own = device.state()  # first: a device may give back chains that it holds
            return {
                "status": self._status,
                "failed": device.failed,
                "features": self._accepted,
                "device_features_select": self.device_features_select,
                "driver_features_select": self.driver_features_select,
                "queue_select": self.queue_select,
                "config_generation": device.config_generation,
                "queues": [queue.state() for queue in device.queues],
                "device": own,
            }

    def restore(self, state: "State") -> None:
        """Take ``state`` back, on a device that nobody drove yet, and go on where it stopped.

        The transport has set the interrupts up. Raises ValueError where this device is not what was saved.
        """
        device = self.device
        with device.lock:
            queues, accepted = state["queues"], state["features"]
            if len(queues) != len(device.queues):
                raise ValueError(f"{device.name}: {len(queues)} queues were saved, not {len(device.queues)}")
            if state["status"] & status.FEATURES_OK and accepted & ~device.offered:
                raise ValueError(f"{device.name}: its driver uses features {accepted & ~device.offered:#x}")
            device.restore(state["device"])
            for queue, saved in zip(device.queues, queues, strict=True):
                try:
                    queue.restore(saved)
                except OverflowError as error:
                    raise ValueError(f"{device.name}: no queue is in the state {saved}") from error
            self.device_features_select = state["device_features_select"]
            self.driver_features_select = state["driver_features_select"]
            self.queue_select = state["queue_select"]
            device.config_generation = state["config_generation"]
            self._accepted, self._status = accepted, state["status"]
            device.failed = state["failed"]
            if self._status & status.FEATURES_OK:
                device.driver_features = accepted
            if self._status & status.DRIVER_OK and not device.failed:
                self._activate()

"""The common configuration of a virtio device on PCI, and which MSI-X vector serves what.

Source: virtio 1.2, 4.1.4.3 (Common configuration structure layout), 4.1.5.1 (Device Initialization)
"""

import os

from pileus.bus import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.pci.msix import Msix
    from pileus.virtio.control import Control
    from pileus.virtio.device import State

    Read = Callable[["CommonConfig"], int]
    Write = Callable[["CommonConfig", int], None]

SIZE = 0x38
NO_VECTOR = 0xFFFF


class CommonConfig(PythonDevice):
    """The registers of ``control``; its interrupts are vectors of ``msix``."""

    control: "Control"

    def __init__(self, control: "Control", msix: "Msix") -> None:
        self.control = control
        self._msix = msix
        self._config_vector = NO_VECTOR
        self._queue_vectors: dict[int, int] = {}

    def read(self, offset: int, size: int) -> int:
        """A driver uses each register's own width (4.1.3.1); 8 bytes are two of 4. All else reads as 0."""
        if size == 8:
            return self.read(offset, 4) | self.read(offset + 4, 4) << 32
        width, read, _ = REGISTERS.get(offset, NO_REGISTER)
        with self.control.device.lock:
            return read(self) if width == size else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 8:
            self.write(offset, 4, value & 0xFFFFFFFF)
            self.write(offset + 4, 4, value >> 32)
            return
        width, _, write = REGISTERS.get(offset, NO_REGISTER)
        with self.control.device.lock:
            if width == size:
                write(self, value)

    @property
    def config_vector(self) -> int:
        return self._config_vector

    @config_vector.setter
    def config_vector(self, number: int) -> None:
        self._config_vector = self._existing(number)

    @property
    def queue_vector(self) -> int:
        """The vector of the selected queue."""
        return self._queue_vectors.get(self.control.queue_select, NO_VECTOR)

    @queue_vector.setter
    def queue_vector(self, number: int) -> None:
        if self.control.queue is not None:
            self._set_queue_vector(self.control.queue_select, number)

    def signal_config(self) -> None:
        """Raise the vector for a changed configuration, if there is one."""
        if (fd := self._fd(self._config_vector)) >= 0:
            os.eventfd_write(fd, 1)

    def forget_vectors(self) -> None:
        self._config_vector = NO_VECTOR
        self._queue_vectors.clear()
        for queue in self.control.device.queues:
            queue.call_fd = -1

    def state(self) -> "State":
        vectors = [self._queue_vectors.get(index, NO_VECTOR) for index in range(self._queue_count)]
        return {"config": self._config_vector, "queues": vectors}

    def restore(self, state: "State") -> None:
        """Take ``state`` back, before the queues are active. Raises ValueError if it is not one."""
        if len(state["queues"]) != self._queue_count:
            raise ValueError(f"{len(state['queues'])} queues had vectors, not {self._queue_count}")
        self._config_vector = self._existing(state["config"])
        for index, number in enumerate(state["queues"]):
            self._set_queue_vector(index, number)

    @property
    def _queue_count(self) -> int:
        return len(self.control.device.queues)

    def _set_queue_vector(self, index: int, number: int) -> None:
        self._queue_vectors[index] = number = self._existing(number)
        self.control.device.queues[index].call_fd = self._fd(number)
        self.control.device.call_changed(index)

    def _existing(self, number: int) -> int:
        """A vector that cannot be had reads back as none (4.1.5.1.2)."""
        return number if number < len(self._msix.vectors) else NO_VECTOR

    def _fd(self, number: int) -> int:
        return self._msix.vectors[number].fd if number < len(self._msix.vectors) else -1


def _constant(read: "Read") -> "tuple[Read, Write]":
    return read, lambda common, value: None


def _of_control(name: str) -> "tuple[Read, Write]":
    return (
        lambda common: int(getattr(common.control, name)),
        lambda common, value: setattr(common.control, name, value),
    )


def _vector(name: str) -> "tuple[Read, Write]":
    return lambda common: int(getattr(common, name)), lambda common, value: setattr(common, name, value)


def _of_queue(name: str) -> "Read":
    """An attribute of the selected queue, 0 where it does not exist."""
    return lambda common: 0 if (queue := common.control.queue) is None else int(getattr(queue, name))


def _address(which: str, high: bool) -> "tuple[Read, Write]":
    return (
        lambda common: common.control.queue_address(which, high),
        lambda common, value: common.control.set_queue_address(which, high, value),
    )


def _enable(common: CommonConfig, value: int) -> None:
    if value == 1:
        common.control.enable_queue()


REGISTERS: "dict[int, tuple[int, Read, Write]]" = {  # offset -> bytes, read, write
    0x00: (4, *_of_control("device_features_select")),
    0x04: (4, *_constant(lambda common: common.control.device_features)),
    0x08: (4, *_of_control("driver_features_select")),
    0x0C: (4, *_of_control("driver_features")),
    0x10: (2, *_vector("config_vector")),
    0x12: (2, *_constant(lambda common: len(common.control.device.queues))),
    0x14: (1, lambda common: common.control.status, lambda common, value: common.control.set_status(value)),
    0x15: (1, *_constant(lambda common: common.control.device.config_generation & 0xFF)),
    0x16: (2, *_of_control("queue_select")),
    0x18: (2, _of_queue("size"), lambda common, value: common.control.set_queue_size(value)),
    0x1A: (2, *_vector("queue_vector")),
    0x1C: (2, _of_queue("enabled"), _enable),
    # queue_notify_off: each queue has its own doorbell.
    0x1E: (2, *_constant(lambda common: common.control.queue_select if common.control.queue else 0)),
    0x20: (4, *_address("descriptors", False)),
    0x24: (4, *_address("descriptors", True)),
    0x28: (4, *_address("available", False)),
    0x2C: (4, *_address("available", True)),
    0x30: (4, *_address("used", False)),
    0x34: (4, *_address("used", True)),
}
NO_REGISTER: "tuple[int, Read, Write]" = (0, *_constant(lambda common: 0))

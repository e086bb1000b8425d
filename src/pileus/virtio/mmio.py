"""The virtio-mmio transport, version 2: a page of registers and one interrupt, for guests without PCI.

Source: virtio 1.2, 4.2 (Virtio Over MMIO)
"""

import os

from pileus.virtio._mmio import MmioWindow
from pileus.virtio.control import Control

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pileus.memory import GuestMemory
    from pileus.virtio.device import VirtioDevice

    class Doorbells(Protocol):
        """Who makes a guest's write signal an eventfd: KVM's ioeventfds."""

        def add_ioeventfd(self, fd: int, address: int, size: int, value: int | None = None) -> None: ...


WINDOW_SIZE = 0x1000
MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"PILE", "little")
CONFIG = 0x100  # device-specific configuration from here on
QUEUE_NOTIFY = 0x050
SHARED_MEMORY_SELECT, SHARED_MEMORY = 0x0AC, range(0x0B0, 0x0C0, 4)
ABSENT = 0xFFFFFFFF  # length and base of a shared memory region that does not exist

READ: "dict[int, Callable[[Control], int]]" = {
    0x000: lambda control: MAGIC,
    0x004: lambda control: VERSION,
    0x008: lambda control: control.device.id,
    0x00C: lambda control: VENDOR,
    0x010: lambda control: control.device_features,
    0x034: lambda control: 0 if (queue := control.queue) is None else queue.max_size,
    0x044: lambda control: 0 if (queue := control.queue) is None else int(queue.enabled),
    0x070: lambda control: control.status,
    0x0FC: lambda control: control.device.config_generation,
}


def _ready(control: Control, value: int) -> None:
    if value & 1:
        control.enable_queue()
    else:
        control.disable_queue()


def _address(which: str, high: bool) -> "Callable[[Control, int], None]":
    return lambda control, value: control.set_queue_address(which, high, value)


WRITE: "dict[int, Callable[[Control, int], None]]" = {
    0x014: lambda control, value: setattr(control, "device_features_select", value),
    0x020: lambda control, value: setattr(control, "driver_features", value),
    0x024: lambda control, value: setattr(control, "driver_features_select", value),
    0x030: lambda control, value: setattr(control, "queue_select", value),
    0x038: Control.set_queue_size,
    0x044: _ready,
    0x070: lambda control, value: control.set_status(value & 0xFF),
    0x080: _address("descriptors", False),
    0x084: _address("descriptors", True),
    0x090: _address("available", False),
    0x094: _address("available", True),
    0x0A0: _address("used", False),
    0x0A4: _address("used", True),
}


class MmioTransport(MmioWindow):
    """Carries ``device``. ``call_fd`` is an eventfd that raises its interrupt."""

    def __init__(self, device: "VirtioDevice", memory: "GuestMemory", call_fd: int) -> None:
        self.device = device
        self.name = device.name
        self.control = Control(device, memory)
        self.control.interrupt = self._config_changed
        self.control.forget = self._forget
        self._call_fd = call_fd
        self.window: tuple[int, int] | None = None  # where the guest sees shared memory, and its size
        self._selected = 0
        self._forget()

    def wire(self, doorbells: "Doorbells", base: int) -> None:
        """For registers at ``base``: a queue's number written to the notify register kicks that queue."""
        for index, queue in enumerate(self.device.queues):
            doorbells.add_ioeventfd(queue.kick_fd, base + QUEUE_NOTIFY, 4, index)

    def read(self, offset: int, size: int) -> int:
        with self.device.lock:
            if offset in SHARED_MEMORY and size == 4:
                return self._shared_memory(offset)
            if offset >= CONFIG:
                return int.from_bytes(self.device.read_config(offset - CONFIG, size), "little")
            reader = READ.get(offset)
            return reader(self.control) if reader is not None and size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        with self.device.lock:
            if offset >= CONFIG:
                self.device.write_config(offset - CONFIG, value.to_bytes(size, "little"))
            elif size == 4 and offset == SHARED_MEMORY_SELECT:
                self._selected = value
            elif size == 4 and offset == QUEUE_NOTIFY:
                self._notify(value)
            elif size == 4 and (writer := WRITE.get(offset)) is not None:
                writer(self.control, value)

    def _shared_memory(self, offset: int) -> int:
        """4.2.2: length, then base of the selected region, each low and high. There is one, if any."""
        if self._selected or self.window is None:
            return ABSENT
        base, size = self.window
        number = (size, base)[(offset - SHARED_MEMORY[0]) // 8]
        return number >> 8 * (offset & 4) & 0xFFFFFFFF

    def _notify(self, index: int) -> None:
        """A doorbell that no ioeventfd took."""
        if index < len(self.device.queues):
            os.eventfd_write(self.device.queues[index].kick_fd, 1)

    def _config_changed(self) -> None:
        self.set_config_pending(True)
        os.eventfd_write(self._call_fd, 1)

    def _forget(self) -> None:
        """After a reset: no news of the configuration, and one interrupt for all queues again."""
        self.set_config_pending(False)
        for queue in self.device.queues:
            queue.call_fd = self._call_fd

"""A bus to put functions on, and routes that remember what was asked of them."""

import os

import pytest

from pileus.bus import Bus, PythonDevice
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus

LOW = Window(0xC0000000, 0x1000_0000)
HIGH_BASE = 0x10_0000_0000


class FakeRoutes:
    """Stands for kvm.routing.Routes; ``delivered`` takes from attached eventfds, as KVM does."""

    def __init__(self) -> None:
        self.messages: dict[int, tuple[int, int]] = {}
        self.attached: dict[int, int] = {}  # fd -> gsi
        self.given: set[int] = set()
        self.calls: list[str] = []

    def allocate(self) -> int:
        gsi = next(gsi for gsi in range(24, 4096) if gsi not in self.given)
        self.given.add(gsi)
        return gsi

    def free(self, gsi: int) -> None:
        self.given.remove(gsi)

    def set(self, gsi: int, address: int, data: int) -> None:
        self.messages[gsi] = (address, data)

    def attach(self, fd: int, gsi: int) -> None:
        assert fd not in self.attached
        self.attached[fd] = gsi
        self.calls.append("attach")

    def detach(self, fd: int, gsi: int) -> None:
        assert self.attached.pop(fd) == gsi
        self.calls.append("detach")

    def delivered(self) -> list[tuple[int, int]]:
        messages = []
        for fd, gsi in self.attached.items():
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                continue
            messages.append(self.messages[gsi])
        return messages


class Memory(PythonDevice):
    """Bytes that a BAR shows."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "little")


@pytest.fixture
def routes() -> FakeRoutes:
    return FakeRoutes()


@pytest.fixture
def mmio() -> Bus:
    return Bus("mmio")


@pytest.fixture
def bus(mmio: Bus) -> PciBus:
    return PciBus(mmio, Window(0xC0000000, 0x1000_0000), Window(HIGH_BASE, 0x1000_0000))

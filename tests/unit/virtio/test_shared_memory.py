"""Shared memory of a device, as each transport tells where it is (virtio 1.2, 2.10)."""

import os
from collections.abc import Iterator

import pytest

from pileus.bus import Bus
from pileus.memory import GuestMemory
from pileus.memory._space import Region
from pileus.memory._window import FileWindow
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus
from pileus.virtio.device import VirtioDevice
from pileus.virtio.mmio import MmioTransport
from pileus.virtio.pci import PciTransport
from tests.unit.pci.conftest import FakeRoutes
from tests.unit.virtio.test_mmio import Machine
from tests.unit.virtio.test_pci import BASE, Doorbells

MIB = 1 << 20
SIZE = 4 * MIB
SHARED_MEMORY_CFG = 8
ABSENT = 0xFFFFFFFF


class FakeSlots:
    def __init__(self) -> None:
        self.filled: dict[int, int] = {}  # slot -> gpa
        self._next = 5

    def insert(self, gpa: int, memory: FileWindow) -> int:
        assert memory.size == SIZE
        self.filled[self._next] = gpa
        self._next += 1
        return self._next - 1

    def remove(self, slot: int) -> None:
        del self.filled[slot]


class Shared(VirtioDevice):
    """A device with a window."""

    id = 26
    queue_sizes = (4,)

    def __init__(self) -> None:
        super().__init__("shared0")
        self.windows = (FileWindow(SIZE),)

    def close(self) -> None:
        super().close()
        self.windows[0].close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, Region(-1, MIB))])
    yield memory
    memory.close()


def test_a_pci_driver_finds_it_in_a_bar_of_its_own(memory: GuestMemory) -> None:
    device, slots = Shared(), FakeSlots()
    bus = PciBus(Bus("mmio"), Window(0xE0000000, 1 << 24), Window(BASE, 1 << 30))
    transport = PciTransport(device, memory, FakeRoutes(), Doorbells(), slots)
    bus.add(transport, 3)
    devfn = 3 << 3

    def read(register: int, size: int = 4) -> int:
        return bus.read(devfn, register, size)

    at = read(0x34, 1)
    while (read(at, 1), read(at + 3, 1)) != (9, SHARED_MEMORY_CFG):
        at = read(at + 1, 1)
        assert at, "no such capability"
    assert read(at + 2, 1) == 24
    bar, number = read(at + 4, 1), read(at + 5, 1)
    assert (bar, number) == (2, 0)
    assert read(at + 8) | read(at + 16) << 32 == 0
    assert read(at + 12) | read(at + 20) << 32 == SIZE
    register = 0x10 + 4 * bar
    assert read(register) & 0xF == 0xC  # 64 bits, prefetchable
    assert slots.filled == {}
    bus.write(devfn, 4, 2, 6)
    gpa = read(register) & ~0xF | read(register + 4) << 32
    assert gpa >= BASE
    assert list(slots.filled.values()) == [gpa]
    bus.write(devfn, 4, 2, 4)
    assert slots.filled == {}
    bus.write(devfn, register, 4, gpa + SIZE & 0xFFFFFFFF)
    bus.write(devfn, 4, 2, 6)
    assert list(slots.filled.values()) == [gpa + SIZE]
    transport.close()
    assert slots.filled == {}
    device.close()


def test_an_mmio_driver_finds_it_by_its_registers(memory: GuestMemory) -> None:
    device = Shared()
    call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    transport = MmioTransport(device, memory, call_fd)
    transport.window = (1 << 36) + SIZE, SIZE

    def region() -> list[int]:
        return [transport.read(offset, 4) for offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC)]

    assert region() == [SIZE, 0, SIZE, 1 << 4]
    transport.write(0x0AC, 4, 1)
    assert region() == [ABSENT] * 4
    transport.write(0x0AC, 4, 0)
    assert region() == [SIZE, 0, SIZE, 1 << 4]
    transport.control.reset()
    device.close()
    os.close(call_fd)


def test_a_device_without_any_says_so() -> None:
    machine = Machine()
    assert [machine.get(offset) for offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC)] == [ABSENT] * 4
    machine.close()

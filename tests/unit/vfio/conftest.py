"""A device in memory, and what a function is wired to in a VM."""

import os

import pytest

from pileus.memory import Region
from pileus.vfio import abi
from tests.unit.pci.conftest import FakeRoutes

CONFIG_SIZE = 256


class FakeBackend:
    """Regions are bytes; eventfds are remembered. ``config`` is the device's own configuration space."""

    name = "fake"

    def __init__(self, config: bytes | bytearray, sizes: dict[int, int], irqs: dict[int, int]) -> None:
        self.config = bytearray(config)
        assert len(config) == CONFIG_SIZE
        self.sizes = sizes
        self.regions = [abi.RegionInfo(index, sizes.get(index, 0)) for index in range(abi.REGIONS)]
        self.irqs = irqs
        self.memory = {index: bytearray(size) for index, size in sizes.items()}
        self.memory[abi.CONFIG] = self.config
        self.eventfds: dict[int, list[int]] = {}
        self.resets = self.unmasked = 0
        self.closed = False
        self.unmask_fd: int | None = None

    def read(self, region: int, offset: int, size: int) -> int:
        data = self.memory[region][offset : offset + size]
        assert len(data) == size
        return int.from_bytes(data, "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        assert offset + size <= len(self.memory[region])
        self.memory[region][offset : offset + size] = value.to_bytes(size, "little")

    def map(self, region: int, offset: int, size: int) -> Region | None:
        fd = os.memfd_create("bar")
        os.ftruncate(fd, offset + size)
        return Region(fd, size, offset)

    def set_eventfds(self, kind: int, fds: list[int]) -> None:
        active = [other for other, given in self.eventfds.items() if given and other != kind]
        assert not (fds and active), "one kind at a time"
        self.eventfds[kind] = list(fds)

    def unmask_by(self, fd: int) -> bool:
        self.unmask_fd = fd
        return False

    def unmask(self) -> None:
        self.unmasked += 1

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.closed = True


class FakeVm:
    """Pins, memory slots and the control loop in one."""

    def __init__(self) -> None:
        self.pins: dict[int, tuple[int, int | None]] = {}  # fd -> gsi, resample fd
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> gpa, size
        self.watched: dict[int, object] = {}
        self.regions: dict[int, Region] = {}

    def add_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
        assert fd not in self.pins
        self.pins[fd] = (gsi, resample_fd)

    def remove_irqfd(self, fd: int, gsi: int) -> None:
        assert self.pins.pop(fd)[0] == gsi

    def insert(self, gpa: int, memory: Region, flags: int = 0) -> int:
        slot = next(slot for slot in range(100) if slot not in self.slots)
        self.slots[slot] = (gpa, memory.size)
        self.regions[slot] = memory
        return slot

    def remove(self, slot: int) -> None:
        del self.slots[slot]

    def watch(self, fd: int, events: int, call: object) -> None:
        self.watched[fd] = call

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def routes() -> FakeRoutes:
    return FakeRoutes()

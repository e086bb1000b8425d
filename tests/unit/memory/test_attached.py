"""Memory that is no RAM: devices reach it, and nobody takes it for RAM."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.memory import GuestMemory, Region
from pileus.testing import FakeDriver
from pileus.testing.memory import make_memory
from pileus.virtio import status
from pileus.virtio.devices.balloon import Balloon
from pileus.virtio.devices.rng import Rng

MIB = 1 << 20
RAM = 16 * MIB
HERE, SIZE = 1 << 32, 2 * MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"\x11" * SIZE)
    return path


@pytest.fixture
def memory(path: Path) -> Iterator[GuestMemory]:
    with make_memory([(0, RAM)]) as memory:
        memory.attach(HERE, Region(os.open(path, os.O_RDWR), SIZE))
        yield memory


def test_it_is_read_and_written_as_ram_is(memory: GuestMemory, path: Path) -> None:
    memory.write(HERE + SIZE - 4, b"news")
    assert memory.read(HERE, 2) == b"\x11\x11"
    assert bytes(memory.view(HERE + SIZE - 4, 4)) == b"news"
    assert path.read_bytes()[-4:] == b"news"
    with pytest.raises(ValueError, match="not guest memory"):
        memory.write(HERE + SIZE - 3, b"news")


def test_it_is_no_ram(memory: GuestMemory) -> None:
    assert (memory.size, memory.ranges, len(memory.regions)) == (RAM, [(0, RAM)], 1)
    assert memory.discard(HERE, SIZE) == 0
    assert memory.read(HERE, 2) == b"\x11\x11"


def test_what_others_could_not_see_is_not_shared(memory: GuestMemory, path: Path) -> None:
    memory.attach(HERE + SIZE, Region(os.open(path, os.O_RDONLY), SIZE, private=True))
    memory.write(HERE + SIZE, b"mine")
    assert path.read_bytes()[:4] == b"\x11" * 4
    assert [gpa for gpa, _ in memory.shareable] == [0, HERE]


def test_writes_to_it_are_tracked(memory: GuestMemory) -> None:
    memory.start_tracking()
    memory.write(HERE + 5 * 4096, b"x")
    assert memory.take_dirty(1)[0] == 1 << 5


def test_a_device_reads_and_writes_it(memory: GuestMemory, path: Path) -> None:
    with FakeDriver(Rng("rng0", source=lambda count: b"\xa5" * count), memory=memory) as driver:
        driver.write_descriptor(0, HERE + 0x1000, 0x2000, flags=2)
        driver.offer(0)
        driver.kick()
        assert len(driver.used()) == 1
        driver.write_descriptor(1, HERE + SIZE - 1, 2, flags=2)
        driver.offer(1)
        driver.kick()
        assert driver.status & status.NEEDS_RESET
    assert path.read_bytes()[0xFFF:0x3001] == b"\x11" + b"\xa5" * 0x2000 + b"\x11"


def test_a_guest_cannot_have_it_given_back(memory: GuestMemory, path: Path) -> None:
    """Free pages of RAM, it is told to say. What is in the file stays."""
    with FakeDriver(Balloon("balloon0", free_page_reporting=True), memory=memory) as driver:
        reporting = len(driver.rings) - 1
        driver.write_descriptor(0, HERE, SIZE, flags=2, queue=reporting)
        driver.offer(0, reporting)
        driver.kick(reporting)
        assert len(driver.used(reporting)) == 1
        inflate = (HERE // 4096).to_bytes(4, "little")
        driver.add([inflate], queue=0)
        driver.kick(0)
        assert driver.status & status.NEEDS_RESET
    assert path.read_bytes() == b"\x11" * SIZE


def test_there_is_an_end_to_them(path: Path) -> None:
    with make_memory([(0, RAM)]) as memory:
        for index in range(63):
            memory.attach(HERE + index * SIZE, Region(-1, SIZE))
        region = Region(-1, SIZE)
        with pytest.raises(ValueError, match="at most 64"):
            memory.attach(HERE << 1, region)
        region.close()

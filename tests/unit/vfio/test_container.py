"""What a container learns of the host's IOMMU, and which of the guest's memory it maps."""

import fcntl
import os
import struct
from collections.abc import Iterator

import pytest

from pileus.memory import GuestMemory, Region
from pileus.vfio import abi, container
from pileus.vfio.container import ANYWHERE, DMA_MAP, DMA_UNMAP, IOMMU_INFO, Container

MIB = 1 << 20
HIGH = 4 << 30


def info(*ranges: tuple[int, int], other: bool = False) -> bytes:
    start = IOMMU_INFO.size
    data = IOMMU_INFO.pack(0, 2, 4096, start, 0)
    if other:
        data += abi.CAPABILITY.pack(3, 1, start + 16) + bytes(8)
    data += abi.CAPABILITY.pack(1, 1, 0) + struct.pack("=II", len(ranges), 0)
    return data + b"".join(abi.AREA.pack(*each) for each in ranges)


@pytest.mark.parametrize(
    ("data", "last"),
    [
        (IOMMU_INFO.pack(0, 1, 4096, 0, 0), ANYWHERE),
        (info((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)), (1 << 39) - 1),
        (info((0, (1 << 48) - 1), other=True), (1 << 48) - 1),
        (info(), ANYWHERE),
        (info((0, 5))[:-1], ANYWHERE),
        (IOMMU_INFO.pack(0, 2, 4096, 1 << 31, 0), ANYWHERE),
        (IOMMU_INFO.pack(0, 2, 4096, 24, 0) + abi.CAPABILITY.pack(9, 1, 0) + bytes(8), ANYWHERE),
    ],
)
def test_the_end_of_what_can_be_mapped(data: bytes, last: int) -> None:
    assert container._last_iova(data) == last


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """What is asked of the kernel: (request, its fields)."""
    asked: list[tuple[int, tuple[int, ...]]] = []

    def ioctl(fd: int, request: int, data: bytes | int = 0) -> int:
        if request == container.IOMMU_MAP_DMA:
            asked.append((request, DMA_MAP.unpack(data)))  # type: ignore[arg-type]
        elif request == container.IOMMU_UNMAP_DMA:
            asked.append((request, DMA_UNMAP.unpack(data)))  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(container, "PATH", os.devnull)
    return asked


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, Region(-1, 2 * MIB)), (HIGH, Region(-1, MIB))])
    yield memory
    memory.close()


@pytest.fixture
def space(calls: list[object], memory: GuestMemory) -> Iterator[Container]:
    space = Container(memory)
    yield space
    space.close()


def test_a_mapping_is_of_memory_only(
    space: Container, memory: GuestMemory, calls: list[tuple[int, tuple[int, ...]]]
) -> None:
    low, high = (region.hva for _, region in memory.regions)
    read = abi.DMA_READ
    space.map(0x10000, 0x1FFFF, MIB, read)
    space.map(1 << 38, (1 << 38) + 4 * MIB - 1, 2 * MIB - 4096, read)  # a page, then the hole
    space.map(1 << 39, (1 << 39) + 2 * MIB - 1, HIGH - 4096, read)  # the hole, then all that is above it
    space.map(0, 0xFFF, HIGH + MIB, read)
    space.map(0, 0xFFF, 0, 0)
    assert [fields[1:] for _, fields in calls] == [
        (read, low + MIB, 0x10000, 0x10000),
        (read, low + 2 * MIB - 4096, 1 << 38, 4096),
        (read, high, (1 << 39) + 4096, MIB),
    ]


def test_everything_is_unmapped_without_an_overflow(
    space: Container, calls: list[tuple[int, tuple[int, ...]]]
) -> None:
    space.unmap(0, ANYWHERE)
    space.last = (1 << 39) - 1
    space.unmap(0, ANYWHERE)
    space.unmap(1 << 40, ANYWHERE)
    assert [fields[2:] for _, fields in calls] == [(0, ANYWHERE), (0, 1 << 39)]

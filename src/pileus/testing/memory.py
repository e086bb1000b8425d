"""RAM for a guest that is none, and a place in it for each thing a driver needs."""

import mmap
import os
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pileus.memory import GuestMemory, Region
from pileus.memory._iommu import Endpoint, Iommu

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20
PAGE = 4096
READ, WRITE = 1, 2
PROT_NONE = 0
GUARD = 16 * 4096
CANARY = b"\xc5" * 16  # behind each block: a device that writes past a buffer changes it


def make_memory(
    ranges: Iterable[tuple[int, int]], shared: bool = False, guarded: bool = False
) -> GuestMemory:
    """RAM at ``ranges`` of (gpa, size), whole pages.

    ``shared`` makes each a memfd, as a backend process needs it. ``guarded`` puts pages around each that end
    the process when they are touched, and stay for its life.
    """
    regions: list[tuple[int, Region]] = []
    try:
        for gpa, size in ranges:
            regions.append((gpa, _guarded(size, shared) if guarded else _region(size, shared)))
        return GuestMemory(regions)
    except BaseException:
        for _, region in regions:
            region.close()
        raise


def _region(size: int, shared: bool) -> Region:
    if not shared:
        return Region(-1, size)
    fd = os.memfd_create("pileus-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return Region(fd, size)


_guards: list[mmap.mmap] = []


def _guarded(size: int, shared: bool) -> Region:
    """Linux maps from the top down: what is mapped before and after surrounds it, once gaps are filled."""
    gaps: list[Region] = []
    for _ in range(1000):
        _guards.append(mmap.mmap(-1, GUARD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, PROT_NONE))
        region = _region(size, shared)
        _guards.append(mmap.mmap(-1, GUARD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, PROT_NONE))
        if _is_guard(region.hva - 1) and _is_guard(region.hva + size):
            for each in gaps:
                each.close()
            return region
        gaps.append(region)
    raise OSError("the kernel maps no guard page beside a region")


def _is_guard(hva: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= hva < end:
                return access.startswith("---")
    return False


def page_by_page(size: int) -> Endpoint:
    """What reaches ``size`` bytes from 0 where they are, each page by a mapping of its own."""
    iommu = Iommu(bypass=False)
    endpoint = iommu.add_endpoint(8, "device")
    iommu.attach(endpoint, 1)
    for page in range(0, size, PAGE):
        iommu.map(iommu.domains[1], page, page + PAGE - 1, page, READ | WRITE)
    return endpoint


class Scrambled:
    """RAM as a device behind a virtual IOMMU sees it: ``memory``'s first region, its pages in another order.

    IOVAs are those of the region. ``map`` tells an address space of it, which has no mappings there yet.
    """

    def __init__(self, memory: GuestMemory, seed: int = 1) -> None:
        self.memory = memory
        base, size = memory.ranges[0]
        order = list(range(base // PAGE, (base + size) // PAGE))
        random.Random(seed).shuffle(order)
        self.ranges = [(base, size)]
        self.pages = {base // PAGE + index: page for index, page in enumerate(order)}  # of IOVAs -> of GPAs

    def map(self, endpoint: Endpoint, domain: int = 1) -> None:
        """Put ``endpoint`` in ``domain``, and map what is not mapped there."""
        iommu = endpoint.iommu
        iommu.attach(endpoint, domain)
        for page, target in self.pages.items():
            iommu.map(iommu.domains[domain], page * PAGE, page * PAGE + PAGE - 1, target * PAGE, READ | WRITE)

    def unmap(self, endpoint: Endpoint, iova: int, size: int = PAGE) -> None:
        assert endpoint.domain is not None
        first = iova // PAGE * PAGE
        last = -(-(iova + size) // PAGE) * PAGE - 1
        assert endpoint.iommu.unmap(endpoint.domain, first, last) >= 0

    def gpa(self, iova: int) -> int:
        return self.pages[iova // PAGE] * PAGE + iova % PAGE

    def read(self, iova: int, size: int) -> bytes:
        parts = []
        while size:
            here = min(size, PAGE - iova % PAGE)
            parts.append(self.memory.read(self.gpa(iova), here))
            iova += here
            size -= here
        return b"".join(parts)

    def write(self, iova: int, data: "Buffer") -> None:
        left = memoryview(data)
        while left:
            here = min(len(left), PAGE - iova % PAGE)
            self.memory.write(self.gpa(iova), left[:here])
            iova += here
            left = left[here:]


class Heap:
    """Hands out blocks of one range of RAM; ``free``d ones are taken again by blocks of the same size."""

    def __init__(self, memory: GuestMemory | Scrambled, gpa: int, size: int) -> None:
        self.memory = memory
        self._next = gpa
        self._end = gpa + size
        self._free: dict[int, list[int]] = {}

    def take(self, size: int, align: int = 16) -> int:
        """The GPA of ``size`` bytes, with a canary behind them."""
        if align == 16 and (spare := self._free.get(size)):
            return spare.pop()
        gpa = -(-self._next // align) * align
        self._next = gpa + size + len(CANARY)
        if self._next > self._end:
            raise MemoryError("the driver has no RAM left: take used chains back, or give it more")
        self.memory.write(gpa + size, CANARY)
        return gpa

    def free(self, gpa: int, size: int) -> None:
        self._free.setdefault(size, []).append(gpa)

    def intact(self, gpa: int, size: int) -> bool:
        """Whether nobody wrote right behind a block."""
        return self.memory.read(gpa + size, len(CANARY)) == CANARY

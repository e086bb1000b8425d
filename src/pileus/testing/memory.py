"""RAM for a guest that is none, and a place in it for each thing a driver needs."""

import os
from collections.abc import Iterable

from pileus.memory import GuestMemory, Region

MIB = 1 << 20
CANARY = b"\xc5" * 16  # behind each block: a device that writes past a buffer changes it


def make_memory(ranges: Iterable[tuple[int, int]], shared: bool = False) -> GuestMemory:
    """RAM at ``ranges`` of (gpa, size); ``shared`` makes each a memfd, as a backend process needs it."""
    regions: list[tuple[int, Region]] = []
    try:
        for gpa, size in ranges:
            fd = os.memfd_create("pileus-test", os.MFD_CLOEXEC) if shared else -1
            if fd >= 0:
                os.ftruncate(fd, size)
            regions.append((gpa, Region(fd, size)))
        return GuestMemory(regions)
    except BaseException:
        for _, region in regions:
            region.close()
        raise


class Heap:
    """Hands out blocks of one range of RAM; ``free``d ones are taken again by blocks of the same size."""

    def __init__(self, memory: GuestMemory, gpa: int, size: int) -> None:
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

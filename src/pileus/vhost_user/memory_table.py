"""The guest's memory as a front-end hands it over: files, and where they are for it and for the guest.

Source: vhost-user specification, Memory region description; Multiple memory regions
"""

import os
import stat

from pileus.errors import HostError, RemoteProtocolError
from pileus.memory import GuestMemory, Region
from pileus.memory._space import page_size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    About = tuple[int, int, int, int]  # gpa, size, hva in the front-end, offset in the descriptor

SLOTS = 64  # regions at most
END = 1 << 64


class MemoryTable:
    """Regions that overlap neither for the guest nor for the front-end, each all within its file.

    What changes it makes another ``memory``; the one before stays usable for who has it.
    """

    def __init__(self) -> None:
        self.memory: GuestMemory | None = None
        self._regions: list[tuple[About, Region]] = []

    def replace(self, regions: "Iterable[tuple[About, int]]") -> None:
        """These regions and no others; of their descriptors, copies are kept. Raises PileusError."""
        wanted: list[tuple[About, Region]] = []
        for about, fd in regions:
            _judge(about, wanted)
            wanted.append((about, _map(about, fd)))
        self._set(wanted)

    def add(self, about: "About", fd: int) -> None:
        """One more. Raises PileusError."""
        if len(self._regions) == SLOTS:
            raise RemoteProtocolError(f"more than {SLOTS} regions of memory")
        _judge(about, self._regions)
        self._set([*self._regions, (about, _map(about, fd))])

    def remove(self, about: "About") -> None:
        """One less: the one at the same place, whatever its offset."""
        left = [each for each in self._regions if each[0][:3] != about[:3]]
        if len(left) == len(self._regions):
            raise RemoteProtocolError(f"there is no region of {about[1]:#x} bytes at {about[0]:#x}")
        self._set(left)

    def clear(self) -> None:
        self._regions = []
        self.memory = None

    def gpa(self, hva: int) -> int:
        """Where the guest has what the front-end has at ``hva``."""
        for (gpa, size, start, _), _ in self._regions:
            if start <= hva < start + size:
                return gpa + hva - start
        raise RemoteProtocolError(f"{hva:#x} is in no region of memory")

    def _set(self, regions: "list[tuple[About, Region]]") -> None:
        self._regions = sorted(regions, key=lambda each: each[0][0])
        self.memory = GuestMemory([(about[0], region) for about, region in self._regions])


def _judge(about: "About", others: "list[tuple[About, Region]]") -> None:
    gpa, size, hva, offset = about
    if not size or max(gpa, hva, offset) + size > END:
        raise RemoteProtocolError(f"there is no region of {size:#x} bytes at {gpa:#x}")
    for (other_gpa, other_size, other_hva, _), _ in others:
        for here, there in ((gpa, other_gpa), (hva, other_hva)):
            if here < there + other_size and there < here + size:
                raise RemoteProtocolError(f"the region at {gpa:#x} overlaps the one at {other_gpa:#x}")


def _map(about: "About", fd: int) -> Region:
    _, size, _, offset = about
    try:
        status = os.fstat(fd)
        page_size = page_size_of(fd)
        if stat.S_ISREG(status.st_mode) and offset + size > status.st_size:
            raise RemoteProtocolError(
                f"a region of {size:#x} bytes at {offset:#x} of a file of {status.st_size:#x}"
            )
        fd = os.dup(fd)
    except OSError as error:
        raise HostError("map", f"{size:#x} bytes of guest memory", error) from error
    try:
        return Region(fd, size, offset, page_size=page_size, guarded=True)
    except BaseException:
        os.close(fd)
        raise

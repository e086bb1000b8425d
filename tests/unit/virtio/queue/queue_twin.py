"""The slow twin of the compiled queue: the same decisions, written from the specification in plain Python.

Source: virtio 1.2, 2.7 (Split Virtqueues)
"""

from struct import unpack_from
from typing import NamedTuple

JUMPED = "the available index jumped by more than the ring holds"
HEAD_OUTSIDE = "a chain's head is outside the descriptor table"
NEXT_OUTSIDE = "a descriptor's next is outside its table"
LOOP = "a chain of descriptors has a loop"
TOO_LONG = "a chain has more than 1024 buffers"
NOT_MEMORY = "a buffer is not guest memory"
ORDER = "a buffer that the device reads comes after one that it writes"
REFUSED = "an indirect descriptor was used without being negotiated"
NESTED = "an indirect table has an indirect descriptor in it"
CHAINED = "an indirect descriptor has a next one"
TABLE_SIZE = "an indirect table is empty or not a multiple of 16 bytes"

NEXT, WRITE, INDIRECT = 1, 2, 4
MOST = 1024

Buffer = tuple[int, int, bool]  # gpa, length, whether the device writes it


class RingError(Exception):
    """The driver broke a rule; the argument says which."""


class Taken(NamedTuple):
    head: int
    buffers: list[Buffer]


class TwinMemory:
    """Regions of bytes at (gpa, bytes), ascending."""

    def __init__(self, regions: "list[tuple[int, bytearray | memoryview]]") -> None:
        self.regions = regions

    def locate(self, gpa: int) -> "tuple[bytearray | memoryview, int] | None":
        """The region of ``gpa`` and the offset in it."""
        for base, data in self.regions:
            if base <= gpa < base + len(data):
                return data, gpa - base
        return None

    def load(self, gpa: int) -> int:
        data, offset = self.locate(gpa)  # type: ignore[misc] # rings were checked
        return data[offset] | data[offset + 1] << 8

    def store(self, gpa: int, value: int, size: int = 2) -> None:
        data, offset = self.locate(gpa)  # type: ignore[misc]
        data[offset : offset + size] = value.to_bytes(size, "little")


class QueueTwin:
    """Rings of ``size`` at three GPAs; used by one test, for one life of the queue."""

    def __init__(
        self,
        memory: TwinMemory,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        *,
        indirect: bool,
        event_idx: bool,
        start: int = 0,
    ) -> None:
        self.memory = memory
        self.size = size
        self.table, self.available, self.used = descriptors, available, used
        self.indirect, self.event_idx = indirect, event_idx
        self.taken = self.seen = start  # both indices, free-running modulo 65536
        self.completed = self.signalled = start
        self.broken: str | None = None
        self.interrupts = 0

    # -- chains -----------------------------------------------------------------------------------

    def take(self) -> Taken | None:
        if self.broken:
            raise RingError(self.broken)
        try:
            return self._take()
        except RingError as error:
            self.broken = str(error)
            raise

    def _take(self) -> Taken | None:
        if self.seen == self.taken:
            self.seen = self.memory.load(self.available + 2)
            if self.seen == self.taken:
                return None
            offered, in_flight = self.seen - self.taken, self.taken - self.completed
            if offered % 65536 + in_flight % 65536 > self.size:
                raise RingError(JUMPED)
        head = self.memory.load(self.available + 4 + 2 * (self.taken % self.size))
        if head >= self.size:
            raise RingError(HEAD_OUTSIDE)
        buffers = self.walk(head)
        self.taken = (self.taken + 1) % 65536
        return Taken(head, buffers)

    def walk(self, head: int) -> list[Buffer]:
        buffers: list[Buffer] = []
        table, entries, index = self.table, self.size, head
        steps = total = 0
        inside = writing = False
        while True:
            if steps == entries:
                raise RingError(LOOP)
            if total > MOST:
                raise RingError(TOO_LONG)
            steps, total = steps + 1, total + 1
            data, offset = self.memory.locate(table + 16 * index)  # type: ignore[misc]
            gpa, length, flags, following = unpack_from("<QIHH", data, offset)
            if flags & INDIRECT:
                table, entries = self._table(gpa, length, flags, inside)
                steps = index = 0
                inside = True
                continue
            if flags & WRITE:
                writing = True
            elif writing:
                raise RingError(ORDER)
            self._split(buffers, gpa, length, writing)
            if not flags & NEXT:
                return buffers
            index = following
            if index >= entries:
                raise RingError(NEXT_OUTSIDE)

    def _table(self, gpa: int, length: int, flags: int, inside: bool) -> tuple[int, int]:
        if not self.indirect:
            raise RingError(REFUSED)
        if inside:
            raise RingError(NESTED)
        if flags & NEXT:
            raise RingError(CHAINED)
        if not length or length % 16:
            raise RingError(TABLE_SIZE)
        place = self.memory.locate(gpa)
        if place is None or place[1] + length > len(place[0]):
            raise RingError(NOT_MEMORY)
        return gpa, length // 16

    def _split(self, buffers: list[Buffer], gpa: int, length: int, writing: bool) -> None:
        """A buffer across neighbouring regions is several."""
        while length:
            place = self.memory.locate(gpa)
            if place is None:
                raise RingError(NOT_MEMORY)
            here = min(length, len(place[0]) - place[1])
            if len(buffers) == MOST:
                raise RingError(TOO_LONG)
            buffers.append((gpa, here, writing))
            gpa += here
            length -= here

    # -- the way back ------------------------------------------------------------------------------

    def complete(self, head: int, length: int) -> None:
        place = self.used + 4 + 8 * (self.completed % self.size)
        self.memory.store(place, head, 4)
        self.memory.store(place + 4, length, 4)
        self.completed = (self.completed + 1) % 65536

    def publish(self) -> None:
        """Interrupt where the driver asked for one."""
        if self.signalled == self.completed:
            return
        self.memory.store(self.used + 2, self.completed)
        if self.event_idx:
            # Interrupt when the used index went past the event: it is one of those just published.
            event = self.memory.load(self.available + 4 + 2 * self.size)
            count = (self.completed - self.signalled) % 65536
            wanted = any((self.signalled + each) % 65536 == event for each in range(count))
        else:
            wanted = not self.memory.load(self.available) & 1
        self.signalled = self.completed
        self.interrupts += wanted

    # -- kicks -------------------------------------------------------------------------------------

    def enable_kicks(self) -> bool:
        if self.event_idx:
            self.memory.store(self.used + 4 + 8 * self.size, self.taken)
        else:
            self.memory.store(self.used, 0)
        return self.memory.load(self.available + 2) != self.taken

    def disable_kicks(self) -> None:
        if not self.event_idx:
            self.memory.store(self.used, 1)

"""The driver's half of a split virtqueue, in plain Python: slow, and written from the specification alone.

Source: virtio 1.2, 2.7 (Split Virtqueues)
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from pileus.memory import GuestMemory
from pileus.testing.memory import Heap, Scrambled

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4  # a descriptor's flags
NO_INTERRUPT = 1  # of the available ring
NO_NOTIFY = 1  # of the used ring

DESCRIPTOR = Struct("<QIHH")  # gpa, length, flags, next
ELEMENT = Struct("<II")  # head, length
U16 = Struct("<H")


class Used(NamedTuple):
    """What the device gave back: the chain's head, and how many bytes it says it wrote."""

    head: int
    length: int


class Block(NamedTuple):
    """A piece of guest memory that a chain owns."""

    gpa: int
    size: int
    writable: bool


class Chain(NamedTuple):
    """A chain as the driver made it: its buffers, its entries of the table, and its indirect table."""

    blocks: list[Block]
    entries: list[int]
    table: Block | None


class Ring:
    """Rings of ``size`` entries in ``heap``'s memory.

    ``add`` makes and offers well-formed chains; ``write_descriptor``, ``offer`` and ``set_available`` write
    whatever they are told.
    """

    def __init__(self, heap: Heap, size: int, event_idx: bool) -> None:
        self.heap = heap
        self.memory: GuestMemory | Scrambled = heap.memory
        self.size = size
        self.event_idx = event_idx
        self.descriptors = heap.take(DESCRIPTOR.size * size)
        self.available = heap.take(6 + 2 * size)
        self.used_ring = heap.take(6 + ELEMENT.size * size)
        self.memory.write(self.descriptors, bytes(DESCRIPTOR.size * size))
        self.memory.write(self.available, bytes(6 + 2 * size))
        self.memory.write(self.used_ring, bytes(6 + ELEMENT.size * size))
        self.next_available = 0  # what we wrote to the available index
        self.next_used = 0  # how far we read the used ring
        self.kicked_at = 0  # the available index at the last kick
        self._unused = list(range(size - 1, -1, -1))
        self._chains: dict[int, Chain] = {}
        self._returned: set[int] = set()  # heads given back whose memory can still be read

    # -- well-formed chains -----------------------------------------------------------------------

    def add(self, readable: Sequence[bytes], writable: Sequence[int], indirect: bool) -> int:
        """Offer a chain of buffers that hold ``readable`` and buffers of ``writable`` bytes; its head."""
        blocks = [self._readable(data) for data in readable]
        blocks += [Block(self.heap.take(length), length, True) for length in writable]
        if not blocks:
            raise ValueError("a chain has at least one buffer")
        entries = [self._take_entry() for _ in range(1 if indirect else len(blocks))]
        table = None
        if indirect:
            table = Block(self.heap.take(DESCRIPTOR.size * len(blocks)), DESCRIPTOR.size * len(blocks), False)
            self._link(table.gpa, range(len(blocks)), blocks)
            self.write_descriptor(entries[0], table.gpa, table.size, F_INDIRECT)
        else:
            self._link(self.descriptors, entries, blocks)
        self._chains[entries[0]] = Chain(blocks, entries, table)
        self.offer(entries[0])
        return entries[0]

    def _readable(self, data: bytes) -> Block:
        block = Block(self.heap.take(len(data)), len(data), False)
        self.memory.write(block.gpa, data)
        return block

    def _link(self, table: int, entries: Sequence[int], blocks: Sequence[Block]) -> None:
        for index, (entry, block) in enumerate(zip(entries, blocks, strict=True)):
            last = index == len(blocks) - 1
            flags = (F_WRITE if block.writable else 0) | (0 if last else F_NEXT)
            following = 0 if last else entries[index + 1]
            descriptor = DESCRIPTOR.pack(block.gpa, block.size, flags, following)
            self.memory.write(table + DESCRIPTOR.size * entry, descriptor)

    def _take_entry(self) -> int:
        if not self._unused:
            self._forget_returned()
        if not self._unused:
            raise MemoryError(f"all {self.size} descriptors are in flight")
        return self._unused.pop()

    def _forget_returned(self) -> None:
        for head in self._returned:
            chain = self._chains.pop(head)
            self._unused += reversed(chain.entries)
            for block in [*chain.blocks, *([chain.table] if chain.table else [])]:
                self.heap.free(block.gpa, block.size)
        self._returned.clear()

    @property
    def in_flight(self) -> int:
        """Chains that the device has not given back."""
        return len(self._chains) - len(self._returned)

    def blocks(self, head: int) -> list[Block]:
        """The buffers of a chain that ``add`` made."""
        return self._chains[head].blocks

    def read(self, head: int) -> bytes:
        """What its writable buffers hold, until the head is used for another chain."""
        parts = [self.memory.read(each.gpa, each.size) for each in self.blocks(head) if each.writable]
        return b"".join(parts)

    # -- whatever one likes -----------------------------------------------------------------------

    def write_descriptor(
        self, index: int, gpa: int = 0, length: int = 0, flags: int = 0, next: int = 0
    ) -> None:
        self.memory.write(
            self.descriptors + DESCRIPTOR.size * index, DESCRIPTOR.pack(gpa, length, flags, next)
        )

    def offer(self, head: int) -> None:
        """Put ``head`` into the available ring and count it."""
        slot = self.next_available % self.size
        self.memory.write(self.available + 4 + 2 * slot, U16.pack(head))
        self.set_available(self.next_available + 1)

    def set_available(self, index: int) -> None:
        """Write the available index."""
        self.next_available = index & 0xFFFF
        self.memory.write(self.available + 2, U16.pack(self.next_available))

    # -- the way back, and who wants to hear what --------------------------------------------------

    @property
    def used_index(self) -> int:
        return self._load(self.used_ring + 2)

    def take_used(self) -> list[Used]:
        """What the device gave back since the last call; asks to be told of the next."""
        taken = []
        while self.next_used != self.used_index:
            slot = self.next_used % self.size
            place = self.used_ring + 4 + ELEMENT.size * slot
            used = Used(*ELEMENT.unpack(self.memory.read(place, ELEMENT.size)))
            self._check(used)
            taken.append(used)
            self.next_used = (self.next_used + 1) & 0xFFFF
        if self.event_idx:
            self.set_used_event(self.next_used)
        return taken

    def _check(self, used: Used) -> None:
        """What no device may do to a chain that ``add`` made."""
        chain = self._chains.get(used.head)
        if chain is None:
            return  # the test's own
        assert used.head not in self._returned, f"the device gave chain {used.head} back twice"
        room = sum(block.size for block in chain.blocks if block.writable)
        assert used.length <= room, f"the device says it wrote {used.length} bytes where {room} fit"
        for block in chain.blocks:
            assert self.heap.intact(block.gpa, block.size), f"the device wrote past {block}"
        self._returned.add(used.head)

    def set_used_event(self, index: int) -> None:
        """With EVENT_IDX: interrupt when the used index passes ``index``."""
        self.memory.write(self.available + 4 + 2 * self.size, U16.pack(index & 0xFFFF))

    def set_no_interrupt(self, wanted: bool = True) -> None:
        """Without EVENT_IDX: ask for no interrupts, or for some again."""
        self.memory.write(self.available, U16.pack(NO_INTERRUPT if wanted else 0))

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the device wants a kick when the available index passes this."""
        return self._load(self.used_ring + 4 + ELEMENT.size * self.size)

    @property
    def wants_kick(self) -> bool:
        """Whether the device asked to hear of what was offered since the last kick."""
        if not self.event_idx:
            return not self._load(self.used_ring) & NO_NOTIFY
        added = (self.next_available - self.kicked_at) & 0xFFFF
        return (self.next_available - self.avail_event - 1) & 0xFFFF < added

    def _load(self, gpa: int) -> int:
        return int(U16.unpack(self.memory.read(gpa, 2))[0])

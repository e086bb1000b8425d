"""A driver that means harm: builds rings that break every rule, and looks at what the queue makes of them.

Each ring comes from a stream of bytes: of a seeded generator, or given by ``feed``, so that hypothesis can
make, and shrink, what hundreds of rings are decoded from. Most choices take a byte; a byte of 0 is the tame one.

    hostile = HostileDriver(make_memory(RANGES, guarded=True), seed=1)
    hostile.run(1_000_000)      # AssertionError where the queue lets one of its promises go
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pileus.memory._space cimport GuestMemory
from pileus.virtio.queue._queue cimport MAX_BUFFERS, Buffers, Descriptor, Queue, buffers_free, buffers_init

cdef enum:
    PAGE = 4096
    LOW_END = 16 * PAGE         # where a neighbour begins
    NEIGHBOUR_END = 17 * PAGE   # where the hole begins
    ISLAND = 32 * PAGE
    ISLAND_END = 33 * PAGE
    FAR_END_OFFSET = PAGE

    MAX_SIZE = 32               # of a ring
    LONG_TABLE = 4 * PAGE       # an indirect table that is longer than any chain may be
    LONG_COUNT = 1500
    TABLES = 5
    EDGES = 12

cdef uint64_t FAR = <uint64_t>1 << 32

RANGES = [(0, LOW_END), (LOW_END, PAGE), (ISLAND, PAGE), (1 << 32, PAGE)]

cdef enum Promise:
    KEPT
    OUTSIDE             # a vector is not the guest memory it claims to be
    LENGTHS             # the lengths are not the sums of the vectors'
    COUNTS
    HEAD
    IN_FLIGHT           # more chains at once than there are descriptors
    NOT_STOPPED         # a chain after a fault

BROKEN = {
    OUTSIDE: "a buffer is not guest memory",
    LENGTHS: "the lengths of a chain are not those of its buffers",
    COUNTS: "a chain has too many buffers",
    HEAD: "a head is outside the table",
    IN_FLIGHT: "more chains are in flight than the ring holds",
    NOT_STOPPED: "a broken ring goes on",
}


cdef class HostileDriver:
    """Rings of up to 32 in ``memory``, which is of ``RANGES`` and stays the caller's."""

    cdef readonly GuestMemory memory
    cdef readonly Queue queue
    cdef readonly bint indirect, event_idx      # of the ring that was built last
    cdef readonly uint16_t start                # where its indices began
    cdef readonly uint64_t rings, chains, completed
    cdef readonly dict faults                   # what the queue said, and how often
    cdef uint64_t random
    cdef bytes given
    cdef const uint8_t *bytes
    cdef size_t left
    cdef bint fed, ended
    cdef Buffers buffers
    cdef Descriptor[LONG_COUNT] long_table
    cdef uint64_t[TABLES] tables
    cdef uint64_t[EDGES] edges

    def __cinit__(self, GuestMemory memory not None, uint64_t seed=1):
        cdef int index
        buffers_init(&self.buffers)
        self.memory = memory
        self.queue = Queue(MAX_SIZE)
        self.faults = {}
        self.random = seed * <uint64_t>0x9E3779B97F4A7C15 | 1
        for index in range(LONG_COUNT):
            self.long_table[index].gpa = 0
            self.long_table[index].length = index & 1
            self.long_table[index].flags = 1 if index + 1 < LONG_COUNT else 0
            self.long_table[index].next = index + 1
        self.tables = [0x800, LOW_END - 48, NEIGHBOUR_END - 64, ISLAND, LONG_TABLE]
        self.edges = [
            0, LOW_END, NEIGHBOUR_END, ISLAND, ISLAND_END, FAR, FAR + FAR_END_OFFSET, <uint64_t>1 << 63,
            <uint64_t>-1, <uint64_t>-4096, 0x400, 0x600,
        ]

    def __dealloc__(self):
        buffers_free(&self.buffers)

    def close(self):
        self.queue.close()

    def feed(self, bytes data not None):
        """Make the next rings of ``data``, until ``build`` says that it is used up."""
        self.given, self.fed, self.ended = data, True, False
        self.bytes, self.left = data, len(data)

    # -- choices ----------------------------------------------------------------------------------

    cdef uint8_t byte(self) noexcept nogil:
        if not self.fed:
            self.random ^= self.random << 13
            self.random ^= self.random >> 7
            self.random ^= self.random << 17
            return (self.random * <uint64_t>0x2545F4914F6CDD1D) >> 56
        if self.left == 0:
            self.ended = True
            return 0
        self.left -= 1
        self.bytes += 1
        return (self.bytes - 1)[0]

    cdef uint32_t below(self, uint32_t limit) noexcept nogil:
        """Less than ``limit``, which is at most 256."""
        return self.byte() * limit >> 8

    cdef bint one_in(self, uint32_t count) noexcept nogil:
        return self.byte() >= 256 - 256 // count

    cdef uint16_t word(self) noexcept nogil:
        return self.byte() << 8 | self.byte()

    # -- what a ring is made of -------------------------------------------------------------------

    cdef uint64_t _gpa(self) noexcept nogil:
        cdef uint8_t kind = self.byte()
        if kind < 128:
            return self.word() % LOW_END
        if kind < 160:
            return self.tables[kind % TABLES]
        return self.edges[kind % EDGES] + self.byte() - 128  # also past 2^64

    cdef uint32_t _length(self) noexcept nogil:
        cdef uint8_t kind = self.byte()
        if kind < 64:
            return kind
        if kind < 128:
            return kind % 4 * 16
        if kind < 200:
            return self.word() & 0x1FFF
        if kind < 216:
            return LOW_END + kind
        if kind < 224:
            return LONG_COUNT * 16
        return <uint32_t>(<uint64_t>1 << kind % 33) - kind % 2

    cdef uint16_t _flags(self, bint last) noexcept nogil:
        cdef uint8_t kind = self.byte()
        if kind < 192:
            return kind % 4 & 2 | (0 if last else 1)
        if kind < 224:
            return 4
        return kind % 8 | kind << 8

    cdef void _describe(self, Descriptor *entry, uint32_t index, uint32_t count) noexcept nogil:
        cdef Descriptor made
        made.gpa = self._gpa()
        made.length = self._length()
        made.flags = self._flags(index + 1 >= count)
        if made.flags & 4 and self.one_in(2):   # often one that leads somewhere
            made.gpa = self.tables[self.below(TABLES)]
            made.length = 16 * (1 + self.below(4)) if made.gpa != LONG_TABLE else LONG_COUNT * 16
        made.next = index + 1 if not self.one_in(8) else self.word() if self.one_in(4) else self.below(count + 2)
        entry[0] = made

    cdef void _tame(self, Descriptor *entry, uint32_t index) noexcept nogil:
        """What a driver that means well writes: a chain of up to four, whose second half is written."""
        entry.gpa = 0x1000 + <uint64_t>index * 64
        entry.length = 1 + index
        entry.flags = (0 if index % 4 == 3 else 1) | (2 if index % 4 > 1 else 0)
        entry.next = index + 1

    cdef Descriptor *table(self) noexcept nogil:
        return <Descriptor *>self.memory.at(self.queue.descriptors, 1)

    cdef void _place(self, uint32_t size) noexcept nogil:
        """Rings at the front, or each at the very end of its region."""
        if self.one_in(2):
            self.queue.descriptors = ISLAND_END - 16 * size
            self.queue.available = FAR + FAR_END_OFFSET - 6 - 2 * size
            self.queue.used = NEIGHBOUR_END - 8 - 8 * size
        else:
            self.queue.descriptors, self.queue.available, self.queue.used = 0, 0x400, 0x600

    cdef void _fill(self, uint32_t size) noexcept nogil:
        cdef uint32_t index, each, count
        cdef Descriptor *target
        cdef uint16_t *avail = <uint16_t *>self.memory.at(self.queue.available, 6)
        for index in range(size):
            if index < 8 and not self.one_in(2):
                self._describe(&self.table()[index], index, size)
            else:
                self._tame(&self.table()[index], index)
        if self.indirect:
            for index in range(TABLES - 1):
                if self.one_in(4):
                    target = <Descriptor *>self.memory.at(self.tables[index], 48)
                    count = 1 + self.below(3)
                    for each in range(count):
                        self._describe(&target[each], each, count)
            if self.one_in(32):
                memcpy(self.memory.at(LONG_TABLE, sizeof(self.long_table)), &self.long_table, sizeof(self.long_table))
        avail[0] = self.byte() & 1
        for index in range(size):
            avail[2 + index] = self.below(size) if index < 8 and not self.one_in(16) else self.word() % (size + 1)
        avail[2 + size] = self.start + self.below(size + 2) - 1
        avail[1] = self.start + (self.word() if self.one_in(16) else 1 + self.below(size))

    def build(self):
        """The next ring, in place and active; false where the bytes that were given are used up."""
        cdef uint32_t size = 1 << self.below(6)
        cdef uint8_t features = self.byte()
        cdef Queue queue = self.queue
        if self.ended:
            return False
        queue.reset()
        self.indirect, self.event_idx = (features & 7) != 7, (features & 8) != 0
        self.start = 0 if features < 128 else -(features & 15) if features < 224 else self.word()
        queue.size = size
        self._place(size)
        self._fill(size)
        queue.avail_seen = queue.next_avail = queue.next_used = queue.signalled = self.start
        queue.activate(self.memory, (<uint64_t>self.indirect << 28) | (<uint64_t>self.event_idx << 29))
        self.rings += 1
        return True

    # -- what the queue makes of it ---------------------------------------------------------------

    def run(self, uint64_t count):
        """Build rings and take their chains, ``count`` times or until the bytes are used up; how many it were.

        Raises AssertionError, naming the ring, where a chain is not what the queue promises.
        """
        cdef uint64_t done
        cdef int broken
        for done in range(count):
            if not self.build():
                return done
            with nogil:
                broken = self._drive()
            if broken:
                raise AssertionError(f"ring {self.rings}: {BROKEN[broken]}")
            if self.queue.fault:
                self.faults[self.queue.broken] = self.faults.get(self.queue.broken, 0) + 1
        return count

    def scribble(self, uint64_t count):
        """Overwrite descriptors and heads, ``count`` times, wherever rings and tables of another driver may be.

        For a thread beside one that is in ``run``: what was checked must be what is used.
        """
        with nogil:
            while count:
                count -= 1
                self._scribble()

    cdef void _scribble(self) noexcept nogil:
        cdef uint8_t kind = self.byte()
        cdef uint64_t place
        if kind < 96:
            place = 16 * self.below(MAX_SIZE)
        elif kind < 160:
            place = ISLAND_END - 16 * (1 + self.below(MAX_SIZE))
        elif kind < 224:
            place = self.tables[self.below(TABLES)] + 16 * self.below(3)
        else:
            place = 0x404 + 2 * self.below(MAX_SIZE) if kind < 240 else FAR + PAGE - 4 - 2 * self.below(MAX_SIZE)
            (<volatile uint16_t *>self.memory.at(place, 2))[0] = self.below(MAX_SIZE + 1)
            return
        self._describe(<Descriptor *>self.memory.at(place, 16), self.below(4), 4)

    cdef int _drive(self) noexcept nogil:
        cdef uint16_t[MAX_SIZE] heads
        cdef uint32_t flying = 0, left = 4 * self.queue.size, which
        cdef int got, broken
        cdef uint16_t *avail = <uint16_t *>self.memory.at(self.queue.available, 6)
        while left:
            left -= 1
            got = self.queue.take(&self.buffers)
            if got < 0:
                self.queue.publish()
                return KEPT if self.queue.fault and self.queue.take(&self.buffers) < 0 else NOT_STOPPED
            if got:
                self.chains += 1
                if flying == self.queue.size:
                    return IN_FLIGHT
                broken = self._judge()
                if broken:
                    return broken
                if self.one_in(2):
                    self.queue.complete(&self.buffers, self.word())
                    self.completed += 1
                else:
                    heads[flying] = self.buffers.head
                    flying += 1
            elif not self.queue.enable_kicks():
                if not self.one_in(2):
                    return KEPT
                avail[1] += self.below(self.queue.size + 1)      # some more, or one too many
            if flying and self.one_in(3):
                which = self.below(flying)
                self.queue.put(heads[which], self.word())
                self.completed += 1
                flying -= 1
                heads[which] = heads[flying]
            if self.one_in(4):
                self.queue.publish()
            if self.one_in(8):
                which = self.below(self.queue.size)              # while the device is at work
                self._describe(&self.table()[which], which, self.queue.size)
        return KEPT

    cdef int _judge(self) noexcept nogil:
        """Hold the chain against what ``_self.queue.pxd`` promises, and touch the ends of every buffer."""
        cdef Buffers *chain = &self.buffers
        cdef uint64_t readable = 0, writable = 0, length
        cdef uint32_t index
        cdef volatile uint8_t *first
        if chain.head >= self.queue.size:
            return HEAD
        if chain.count > MAX_BUFFERS or chain.readable > chain.count or chain.count > chain.capacity:
            return COUNTS
        for index in range(chain.count):
            length = chain.vectors[index].iov_len
            first = <volatile uint8_t *>chain.vectors[index].iov_base
            if length == 0 or first != self.memory.at(chain.gpas[index], length):
                return OUTSIDE
            if index < chain.readable:
                readable += length
                first[0], first[length - 1]
            else:
                writable += length
                first[0] = first[length - 1] = index
        if readable != chain.readable_length or writable != chain.writable_length:
            return LENGTHS
        return KEPT

# cython: cdivision=True
"""A driver of virtio-blk that keeps a queue busy, as a guest's kernel would: compiled, without the GIL.

Each request is an indirect chain of header, data and status. The driver sleeps on the call fd when nothing
has come back, kicks when asked to, and offers again in one go all that came back together.

Source: virtio 1.2, 2.7 and 5.2
"""

import os
import time

from libc.errno cimport EINTR, EIO, ETIMEDOUT, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pileus._posix cimport (
    eventfd_consume,
    eventfd_signal,
    full_fence,
    load_acquire_u16,
    load_u16,
    store_release_u16,
    store_u16,
)
from pileus.memory._space cimport GuestMemory


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int milliseconds)
    short POLLIN


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    int CLOCK_MONOTONIC


cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, long offset)


cdef enum:
    SECTOR = 512
    PAGE = 4096
    F_NEXT = 1
    F_WRITE = 2
    F_INDIRECT = 4
    IN = 0
    OUT = 1
    NO_NOTIFY = 1
    TIMEOUT = 20000     # milliseconds without any answer


cdef struct Descriptor:
    uint64_t gpa
    uint32_t length
    uint16_t flags
    uint16_t next


cdef struct Slot:           # what a request needs beside its data, in one cache line and a half
    Descriptor[3] table
    uint32_t kind
    uint32_t reserved
    uint64_t sector
    uint8_t status
    uint8_t[31] unused


cdef class BlkLoad:
    """``depth`` requests of ``block_size`` bytes under way, at random places or one after another.

    Rings, requests and data are at ``gpa`` of ``memory``. ``numbered``: each block of the disk begins with its
    number, 64 bits, which is compared. The caller gives the rings' places to the device before ``run``.
    """

    cdef readonly uint64_t descriptors
    cdef readonly uint64_t available
    cdef readonly uint64_t used
    cdef readonly uint64_t requests     # that came back
    cdef readonly uint64_t kicks
    cdef readonly uint64_t interrupts
    cdef GuestMemory memory             # keeps the mapping alive
    cdef int kick_fd
    cdef int call_fd
    cdef uint32_t size
    cdef uint32_t depth
    cdef uint32_t block_size
    cdef uint64_t blocks
    cdef uint64_t place
    cdef bint sequential
    cdef bint write
    cdef bint numbered
    cdef bint event_idx
    cdef Descriptor *table
    cdef uint16_t *avail
    cdef uint16_t *used_ring
    cdef Slot *slots
    cdef uint8_t *data
    cdef uint16_t next_avail
    cdef uint16_t next_used
    cdef uint16_t kicked

    def __init__(self, GuestMemory memory not None, int kick_fd, int call_fd, *, uint64_t disk_size,
                 uint32_t ring_size=256, uint32_t depth=32, uint32_t block_size=4096, bint sequential=False,
                 bint write=False, bint numbered=False, uint64_t gpa=0, bint event_idx=True):
        cdef uint64_t slots, data, size
        cdef uint32_t index
        cdef Slot *slot
        if depth > ring_size:
            raise ValueError(f"{depth} requests do not fit into a ring of {ring_size}")
        self.memory, self.kick_fd, self.call_fd, self.size, self.depth = memory, kick_fd, call_fd, ring_size, depth
        self.block_size, self.blocks = block_size, disk_size // block_size
        self.sequential, self.write, self.numbered, self.event_idx = sequential, write, numbered, event_idx
        self.place = 88172645463325252
        self.descriptors = gpa
        self.available = gpa + 16 * ring_size
        self.used = (self.available + 6 + 2 * ring_size + PAGE - 1) // PAGE * PAGE
        slots = (self.used + 6 + 8 * ring_size + PAGE - 1) // PAGE * PAGE
        data = (slots + depth * sizeof(Slot) + PAGE - 1) // PAGE * PAGE
        size = data + <uint64_t>depth * block_size - gpa
        if memory.at(gpa, size) == NULL:
            raise ValueError(f"{size} bytes at {gpa:#x} are needed")
        memset(memory.at(gpa, size), 0, size)
        self.table = <Descriptor *>memory.at(self.descriptors, 1)
        self.avail = <uint16_t *>memory.at(self.available, 1)
        self.used_ring = <uint16_t *>memory.at(self.used, 1)
        self.slots = <Slot *>memory.at(slots, 1)
        self.data = memory.at(data, 1)
        for index in range(depth):
            slot = &self.slots[index]
            self.table[index].gpa = slots + index * sizeof(Slot)
            self.table[index].length, self.table[index].flags = sizeof(slot.table), F_INDIRECT
            slot.kind = OUT if write else IN
            slot.table[0].gpa = self.table[index].gpa + sizeof(slot.table)
            slot.table[0].length, slot.table[0].flags, slot.table[0].next = 16, F_NEXT, 1
            slot.table[1].gpa = data + <uint64_t>index * block_size
            slot.table[1].length, slot.table[1].next = block_size, 2
            slot.table[1].flags = F_NEXT if write else F_NEXT | F_WRITE
            slot.table[2].gpa = slot.table[0].gpa + 16
            slot.table[2].length, slot.table[2].flags = 1, F_WRITE

    def run(self, double seconds):
        """Requests a second, over about ``seconds``. Raises OSError where one failed or came back wrong."""
        cdef double began = time.monotonic(), took
        cdef int rc
        self.requests = self.kicks = self.interrupts = 0
        with nogil:
            rc = self._run(seconds)
        took = time.monotonic() - began
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))
        return self.requests / took

    cdef int _run(self, double seconds) noexcept nogil:
        cdef double end = _now() + seconds
        cdef uint32_t index, under_way = self.depth
        cdef uint32_t turns = 0
        cdef int got
        cdef bint ending = False
        for index in range(self.depth):
            self._offer(index)
        self._publish()
        while under_way:
            got = self._collect(ending)
            if got < 0:
                return got
            if got == 0:
                if not self._sleep():
                    return -ETIMEDOUT
                continue
            if ending:
                under_way -= got
                continue
            self._publish()
            turns += 1
            if turns & 15 == 0 or self.depth == 1:
                ending = _now() >= end
        return 0

    cdef void _offer(self, uint32_t index) noexcept nogil:
        cdef uint64_t block
        if self.sequential:
            self.place += 1
            block = self.place % self.blocks
        else:
            self.place ^= self.place << 13
            self.place ^= self.place >> 7
            self.place ^= self.place << 17
            block = self.place % self.blocks
        self.slots[index].sector = block * (self.block_size // SECTOR)
        self.slots[index].status = 0xFF
        if self.write and self.numbered:
            memcpy(self.data + <uint64_t>index * self.block_size, &block, 8)
        self.avail[2 + (self.next_avail & (self.size - 1))] = <uint16_t>index
        self.next_avail += 1

    cdef void _publish(self) noexcept nogil:
        cdef uint16_t event
        cdef bint wanted
        store_release_u16(&self.avail[1], self.next_avail)
        full_fence()
        if self.event_idx:
            event = load_u16(&self.used_ring[2 + 4 * self.size])
            wanted = <uint16_t>(self.next_avail - event - 1) < <uint16_t>(self.next_avail - self.kicked)
        else:
            wanted = not load_u16(&self.used_ring[0]) & NO_NOTIFY
        self.kicked = self.next_avail
        if wanted:
            self.kicks += 1
            eventfd_signal(self.kick_fd)

    cdef int _collect(self, bint ending) noexcept nogil:
        """Take back what is done and, unless ``ending``, fill it in again; how many, or -EIO."""
        cdef uint16_t index = load_acquire_u16(&self.used_ring[1])
        cdef uint32_t head
        cdef uint64_t number
        cdef int count = 0
        cdef Slot *slot
        while self.next_used != index:
            head = (<uint32_t *>&self.used_ring[2])[2 * (self.next_used & (self.size - 1))]
            self.next_used += 1
            count += 1
            if head >= self.depth:
                return -EIO
            slot = &self.slots[head]
            if slot.status:
                return -EIO
            if self.numbered and not self.write:
                memcpy(&number, self.data + <uint64_t>head * self.block_size, 8)
                if number * (self.block_size // SECTOR) != slot.sector:
                    return -EIO
            if not ending:
                self._offer(head)
        self.requests += count
        return count

    cdef bint _sleep(self) noexcept nogil:
        """Until the device says that something came back; false if it does not."""
        cdef pollfd one
        if self.event_idx:
            store_u16(&self.avail[2 + self.size], self.next_used)
        full_fence()
        if load_acquire_u16(&self.used_ring[1]) != self.next_used:
            return True
        one.fd, one.events = self.call_fd, POLLIN
        if poll(&one, 1, TIMEOUT) <= 0 and errno != EINTR:
            return False
        eventfd_consume(self.call_fd)
        self.interrupts += 1
        return True


cdef double _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


def read_plainly(int fd, GuestMemory memory not None, uint32_t block_size, uint64_t disk_size, double seconds):
    """Bytes a second of a loop that reads ``fd`` block by block into the same 16 places in turn."""
    cdef uint8_t *data = memory.at(0, 16 * <uint64_t>block_size)
    cdef uint64_t blocks = disk_size // block_size, count = 0
    cdef double began, end
    if data == NULL:
        raise ValueError("the memory is too small")
    with nogil:
        began = end = _now()
        while end < began + seconds:
            if pread(fd, data + (count & 15) * block_size, block_size, (count % blocks) * block_size) != block_size:
                break
            count += 1
            if count & 15 == 0:
                end = _now()
    return count * block_size / max(end - began, 1e-9)

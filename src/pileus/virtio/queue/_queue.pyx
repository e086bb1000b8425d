"""A split virtqueue, the device's side: chains out of the available ring, lengths into the used ring.

The driver owns the rings' memory and may change any of it at any time. So each value is loaded once, checked,
then used; what it names was checked against guest memory before a device sees it. The first broken rule stops
the queue (``fault``), and its device asks for a reset.

The queue knows memory and two eventfds, nothing of transports: it serves a device in the VMM and a vhost-user
backend alike. All methods belong to one thread at a time.

*Behind a virtual IOMMU* every address is an IOVA, those of rings and indirect tables too. Each look at a ring, and the
walk of a chain, is between ``enter`` and ``leave`` of its Translation, so that none uses what an UNMAP that returned has
taken away; rings are found again whenever the generation moved on. A chain with an address that is not mapped is
*refused*: it goes back at once, unused, and the fault is reported; its queue goes on. Rings that are not mapped
break it. Without one, ``pages`` is NULL and that is all it costs.

Source: virtio 1.2, 2.7 (Split Virtqueues)
"""

import os

cimport cython
from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy

from pileus._posix cimport (
    eventfd_consume,
    eventfd_signal,
    full_fence,
    iovec,
    load_acquire_u16,
    load_u16,
    store_release_u8,
    store_release_u16,
    store_u16,
)
from pileus.memory._space cimport NO_MAPPING, READ, WRITE, GuestMemory, Region, Translation, Window

from pileus.errors import GuestError

cdef extern from *:
    """
    /* Both halves are loaded once, whatever the compiler thinks: the driver may write at any time. An indirect
       table may begin at any address. */
    typedef uint64_t __attribute__((aligned(1), may_alias)) pileus_any_u64;
    static inline void pileus_load_descriptor(const void *place, void *entry) {
        uint64_t words[2] = {
            ((const volatile pileus_any_u64 *)place)[0], ((const volatile pileus_any_u64 *)place)[1]
        };
        __builtin_memcpy(entry, words, sizeof words);
    }
    """
    void load_descriptor "pileus_load_descriptor"(const Descriptor *place, Descriptor *entry) nogil


cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *vectors, int count, int64_t at)
    ssize_t pwritev(int fd, const iovec *vectors, int count, int64_t at)


cdef enum:
    F_NEXT = 1          # the chain goes on at ``next``
    F_WRITE = 2         # the device writes this buffer
    F_INDIRECT = 4      # the buffer is a table of descriptors

    NO_INTERRUPT = 1    # in the available ring's flags
    NO_NOTIFY = 1       # in the used ring's flags

    DESCRIPTOR_SIZE = 16
    FIRST_CAPACITY = 8  # vectors; most chains are shorter

    PAGE_SHIFT = 12     # of what the virtual IOMMU maps at least
    PAGE = 1 << PAGE_SHIFT

cdef enum Fault:
    NOTHING
    INDEX_JUMPED
    HEAD_OUTSIDE
    NEXT_OUTSIDE
    LOOP
    TOO_LONG
    NOT_MEMORY
    READABLE_AFTER_WRITABLE
    INDIRECT_REFUSED
    INDIRECT_NESTED
    INDIRECT_CHAINED
    INDIRECT_SIZE
    NO_MEMORY
    RINGS_NOT_MAPPED

cdef enum:
    UNKNOWN = 0         # a reason to refuse a chain, beside those of the Translation

FAULTS = {
    INDEX_JUMPED: "the available index jumped by more than the ring holds",
    HEAD_OUTSIDE: "a chain's head is outside the descriptor table",
    NEXT_OUTSIDE: "a descriptor's next is outside its table",
    LOOP: "a chain of descriptors has a loop",
    TOO_LONG: f"a chain has more than {MAX_BUFFERS} buffers",
    NOT_MEMORY: "a buffer is not guest memory",
    READABLE_AFTER_WRITABLE: "a buffer that the device reads comes after one that it writes",
    INDIRECT_REFUSED: "an indirect descriptor was used without being negotiated",
    INDIRECT_NESTED: "an indirect table has an indirect descriptor in it",
    INDIRECT_CHAINED: "an indirect descriptor has a next one",
    INDIRECT_SIZE: "an indirect table is empty or not a multiple of 16 bytes",
    NO_MEMORY: "the host has no memory for a chain",
    RINGS_NOT_MAPPED: "its rings are not mapped by the virtual IOMMU",
}

F_INDIRECT_DESC = 1 << 28   # feature bits of the ring, the same for all devices: virtio 1.2, 6
F_EVENT_IDX = 1 << 29
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX


cdef inline void _note(Notes *notes, uint16_t head, uint64_t counter) noexcept nogil:
    cdef Note *note = &(<Note *>(notes + 1))[head]
    note.counter = counter
    store_release_u8(&note.inflight, 1)  # release: its place in the order is there before it counts


cdef void buffers_init(Buffers *buffers) noexcept nogil:
    buffers.vectors = NULL
    buffers.gpas = NULL
    buffers.capacity = buffers.readable = buffers.count = 0
    buffers.readable_length = buffers.writable_length = 0
    buffers.head = 0


cdef void buffers_free(Buffers *buffers) noexcept nogil:
    free(buffers.vectors)
    free(buffers.gpas)
    buffers_init(buffers)


cdef bint _grow(Buffers *buffers) noexcept nogil:
    cdef uint32_t capacity = buffers.capacity * 2 if buffers.capacity else FIRST_CAPACITY
    cdef void *larger = realloc(buffers.vectors, capacity * sizeof(iovec))
    if larger == NULL:
        return False
    buffers.vectors = <iovec *>larger
    larger = realloc(buffers.gpas, capacity * sizeof(uint64_t))
    if larger == NULL:
        return False
    buffers.gpas = <uint64_t *>larger
    buffers.capacity = capacity
    return True


cdef inline uint8_t *_paged(uint8_t **pages, uint64_t iova, uint64_t offset) noexcept nogil:
    """A byte of a ring that begins at ``iova``; ``pages`` has where its pages are."""
    cdef uint64_t at = (iova & (PAGE - 1)) + offset
    return pages[at >> PAGE_SHIFT] + (at & (PAGE - 1))


cdef inline uint16_t *_avail_at(Queue queue, uint32_t index, uint8_t **pages) noexcept nogil:
    """A word of the avail ring: flags, idx, ring[size], used_event. ``pages`` are the queue's."""
    if pages == NULL:
        return &queue.avail[index]
    return <uint16_t *>_paged(&pages[queue.first_avail_page], queue.available, 2 * index)


cdef inline uint16_t *_used_at(Queue queue, uint32_t index, uint8_t **pages) noexcept nogil:
    """A word of the used ring: flags, idx, ring[size] of four words, avail_event."""
    if pages == NULL:
        return &queue.used_ring[index]
    return <uint16_t *>_paged(&pages[queue.first_used_page], queue.used, 2 * index)


# These are compiled twice each, so that a queue without an IOMMU decides once a call that it has none.


cdef inline int _next(Queue self, Buffers *buffers, uint8_t **pages) noexcept nogil:
    """As ``take``."""
    cdef uint16_t head
    if self.fault:
        return -1
    if self.avail_seen == self.next_avail:
        # Acquire: the ring's entries and the chains are read after the index that covers them.
        self.avail_seen = load_acquire_u16(_avail_at(self, 1, pages))
        if self.avail_seen == self.next_avail:
            return 0
        # Offered and in flight together are no more chains than the ring has heads. Each is taken modulo
        # 65536 by itself: an index that goes back would else offer 65535 more.
        if (
            <uint32_t><uint16_t>(self.avail_seen - self.next_avail)
            + <uint16_t>(self.next_avail - self.next_used) > self.size
        ):
            return self._fail(INDEX_JUMPED)
    head = load_u16(_avail_at(self, 2 + (self.next_avail & (self.size - 1)), pages))
    if head >= self.size:
        return self._fail(HEAD_OUTSIDE)
    if self._walk(head, buffers, pages) < 0:
        return -1
    buffers.head = head
    self.next_avail += 1
    if pages == NULL and self.notes != NULL:
        _note(self.notes, head, self.notes_counter)
        self.notes_counter += 1
        self.took_again = False
    return 1


cdef inline void _put(Queue self, uint16_t head, uint32_t length, uint8_t **pages) noexcept nogil:
    cdef UsedElement *ring
    cdef UsedElement *element
    cdef uint32_t index = self.next_used & (self.size - 1)
    if pages == NULL:
        ring = <UsedElement *>&self.used_ring[2]
        element = &ring[index]
        element.head = head
        element.length = length
    else:  # the halves of an element may be in two pages
        (<uint32_t *>_used_at(self, 2 + 4 * index, pages))[0] = head
        (<uint32_t *>_used_at(self, 4 + 4 * index, pages))[0] = length
    self.next_used += 1


cdef inline int _vector(Queue self, Buffers *buffers, uint8_t *hva, uint64_t gpa, uint64_t length) noexcept nogil:
    if buffers.count == MAX_BUFFERS:
        return self._fail(TOO_LONG)
    if buffers.count == buffers.capacity and not _grow(buffers):
        return self._fail(NO_MEMORY)
    buffers.vectors[buffers.count].iov_base = hva
    buffers.vectors[buffers.count].iov_len = length
    buffers.gpas[buffers.count] = gpa
    buffers.count += 1
    return 0


@cython.final
cdef class Queue:
    """A virtqueue of up to ``max_size`` descriptors, a power of two.

    The transport fills in ``size``, ``descriptors``, ``available``, ``used`` (GPAs) and ``enabled``; ``activate``
    checks them. Owns ``kick_fd``; ``call_fd`` belongs to whoever set it.
    """

    def __cinit__(self, uint16_t max_size):
        if max_size == 0 or max_size & (max_size - 1) or max_size > 32768:
            raise ValueError(f"a queue has 1 to 32768 descriptors, a power of two, not {max_size}")
        self.max_size = max_size
        self.kick_fd = -1
        self.call_fd = self.refusal = -1
        self.pages = NULL
        self.reset()
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        free(self.pages)
        free(self.again)

    def close(self):
        self.reset()
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            self.kick_fd = -1

    def reset(self):
        """Forget the driver's configuration and where its rings are."""
        self.active = False
        self.generation += 1
        self.memory = self.iommu = None
        free(self.pages)
        self.pages = NULL
        self.since_refusal = 0
        self.table, self.avail, self.used_ring = NULL, NULL, NULL
        self.size, self.enabled = self.max_size, False
        self.descriptors = self.available = self.used = 0
        self.avail_seen = self.next_avail = self.next_used = self.signalled = 0
        self.event_idx = self.indirect = False
        self.fault = NOTHING
        self._forget_notes()
        if self.kick_fd >= 0:
            eventfd_consume(self.kick_fd)

    def activate(self, GuestMemory memory not None, uint64_t features, Translation iommu=None):
        """Start at the configured addresses. Raises GuestError where they are no rings in guest memory.

        Behind ``iommu`` those and all others are IOVAs.
        """
        cdef uint32_t size = self.size
        if size == 0 or size & (size - 1) or size > self.max_size:
            raise GuestError(f"a queue size of {size} is not a power of two up to {self.max_size}")
        if self.descriptors & 15 or self.available & 1 or self.used & 3:
            raise GuestError(f"rings at {self.descriptors:#x}, {self.available:#x}, {self.used:#x} are not aligned")
        if iommu is None:
            self.table = <Descriptor *>memory.at(self.descriptors, size * DESCRIPTOR_SIZE)
            self.avail = <uint16_t *>memory.at(self.available, 6 + 2 * size)
            self.used_ring = <uint16_t *>memory.at(self.used, 6 + 8 * size)
        else:
            self._find_rings(memory, iommu)
        if self.table == NULL or self.avail == NULL or self.used_ring == NULL:
            raise GuestError(
                f"rings of {size} at {self.descriptors:#x}, {self.available:#x}, {self.used:#x} are not guest memory"
            )
        self.memory = memory
        self.event_idx = (features & F_EVENT_IDX) != 0
        self.indirect = (features & F_INDIRECT_DESC) != 0
        self.active = True

    def keep_notes(self, Region region not None, uint64_t offset):
        """Note in ``region`` from ``offset`` on what is taken and not given back, so that another process can
        do what this one leaves undone; and begin with what one before it left, in its order.

        For an active queue whose next chains were not looked at. Raises GuestError for notes that are none.
        Source: vhost-user, Inflight I/O tracking
        """
        cdef Notes *notes
        cdef Note *note
        cdef uint32_t index, size = self.size
        cdef uint16_t used = load_u16(&self.used_ring[1])
        if offset & 7 or offset > region.size or region.size - offset < sizeof(Notes) + size * sizeof(Note):
            raise GuestError(f"there is no room for notes on {size} descriptors at {offset:#x} of {region.size:#x}")
        notes = <Notes *>(region.base + offset)
        note = <Note *>(notes + 1)
        if notes.version == 0 or notes.count != size and not any([note[index].inflight for index in range(size)]):
            notes.version, notes.count, notes.used_index = 1, <uint16_t>size, used
        if notes.version != 1 or notes.count != size:
            raise GuestError(f"notes of version {notes.version} on {notes.count} descriptors, not {size}")
        self.notes, self.notes_region = notes, region
        # Told to the driver, but not struck yet when that process ended.
        self._strike(used - notes.used_index)
        found = sorted([(note[index].counter, index) for index in range(size) if note[index].inflight])
        self.notes_counter = (found[-1][0] + 1) & 0xFFFFFFFFFFFFFFFF if found else 0
        self.again = <uint16_t *>calloc(size, sizeof(uint16_t))
        if self.again == NULL:
            raise MemoryError
        for index, (_, head) in enumerate(found):
            self.again[index] = head
        self.again_count, self.again_next = len(found), 0
        self.signalled = self.next_used = used
        self.avail_seen = self.next_avail = <uint16_t>(used + len(found))

    def _forget_notes(self):
        free(self.again)
        self.again, self.notes, self.notes_region = NULL, NULL, None
        self.again_count = self.again_next = 0
        self.took_again = False

    def _find_rings(self, GuestMemory memory, Translation iommu):
        """The pointers that are no rings behind an IOMMU only say that they were found."""
        cdef uint32_t count = 0
        for begin, length in (
            (self.descriptors, self.size * DESCRIPTOR_SIZE), (self.available, 6 + 2 * self.size),
            (self.used, 6 + 8 * self.size),
        ):
            self.first_avail_page, self.first_used_page = self.first_used_page, count
            count += ((begin & (PAGE - 1)) + length + PAGE - 1) >> PAGE_SHIFT
        free(self.pages)
        self.pages = <uint8_t **>malloc(count * sizeof(uint8_t *))
        if self.pages == NULL:
            raise MemoryError
        self.memory, self.iommu, self.mapped_at = memory, iommu, <uint64_t>-1
        if self._enter():
            self.iommu.leave()
            self.table = <Descriptor *>self.pages[0]
        else:
            self.fault = NOTHING
            self.iommu = None
            free(self.pages)
            self.pages = NULL

    # -- the compiled face ------------------------------------------------------------------------

    cdef int _fail(self, int fault) noexcept nogil:
        self.fault = fault
        return -1

    cdef uint16_t pending(self) noexcept nogil:
        """Chains offered and not taken, as far as was looked."""
        return <uint16_t>(self.avail_seen - self.next_avail)

    cdef int take(self, Buffers *buffers) noexcept nogil:
        if self.pages != NULL:
            return self._take_translated(buffers)
        if self.again_next < self.again_count and not self.fault:
            return self._take_again(buffers)
        return _next(self, buffers, NULL)

    cdef int _take_again(self, Buffers *buffers) noexcept nogil:
        """A chain that was taken by a process before this one; it is noted already."""
        cdef uint16_t head = self.again[self.again_next]
        if self._walk(head, buffers, NULL) < 0:
            return -1
        buffers.head = head
        self.again_next += 1
        self.took_again = True
        return 1

    cdef void untake(self, uint16_t head) noexcept nogil:
        if self.pages != NULL:
            if self.since_refusal == 0:
                self.put(head, 0)
                return
            self.since_refusal -= 1
        elif self.took_again:
            self.again_next -= 1
            return
        self.next_avail -= 1
        if self.notes != NULL:
            (<Note *>(self.notes + 1))[head].inflight = 0

    cdef void _strike(self, uint16_t count) noexcept nogil:
        """The ``count`` chains that were put last are no longer under way."""
        cdef Note *notes = <Note *>(self.notes + 1)
        cdef uint16_t mask = self.size - 1, head = self.notes.last_batch_head & mask
        cdef uint32_t left = min(<uint32_t>count, <uint32_t>self.size)
        while left:
            notes[head].inflight = 0
            head = notes[head].next & mask
            left -= 1
        store_release_u16(&self.notes.used_index, load_u16(&self.used_ring[1]))

    cdef int _walk(self, uint16_t head, Buffers *buffers, uint8_t **pages) noexcept nogil:
        """Follow a chain to its end, each table for no more steps than it has entries."""
        cdef Descriptor *table = self.table
        cdef Descriptor entry
        cdef uint32_t entries = self.size, steps = 0, index = head, total = 0
        cdef uint64_t indirect = 0
        cdef bint inside = False, writable = False
        buffers.count = buffers.readable = 0
        buffers.readable_length = buffers.writable_length = 0
        while True:
            if steps == entries:
                return self._fail(LOOP)
            if total > MAX_BUFFERS:
                return self._fail(TOO_LONG)  # empty buffers make no vectors, but each costs a step
            steps += 1
            total += 1
            if pages == NULL:
                load_descriptor(&table[index], &entry)
            elif not inside:
                load_descriptor(
                    <Descriptor *>_paged(pages, self.descriptors, <uint64_t>index * DESCRIPTOR_SIZE), &entry
                )
            elif self._load_indirect(indirect + <uint64_t>index * DESCRIPTOR_SIZE, &entry) <= 0:
                return -1 if self.fault else 0
            if entry.flags & F_INDIRECT:
                if not self.indirect:
                    return self._fail(INDIRECT_REFUSED)
                if inside:
                    return self._fail(INDIRECT_NESTED)
                if entry.flags & F_NEXT:
                    return self._fail(INDIRECT_CHAINED)
                if entry.length == 0 or entry.length % DESCRIPTOR_SIZE:
                    return self._fail(INDIRECT_SIZE)
                if pages == NULL:
                    table = <Descriptor *>self.memory.at(entry.gpa, entry.length)
                    if table == NULL:
                        return self._fail(NOT_MEMORY)
                indirect = entry.gpa
                entries = entry.length // DESCRIPTOR_SIZE
                steps = index = 0
                inside = True
                continue
            if entry.flags & F_WRITE:
                writable = True
            elif writable:
                return self._fail(READABLE_AFTER_WRITABLE)
            if pages == NULL:
                if self._add(buffers, entry.gpa, entry.length) < 0:
                    return -1
            elif self._add_translated(buffers, entry.gpa, entry.length, WRITE if writable else READ) < 0:
                return -1
            if writable:
                buffers.writable_length += entry.length
            else:
                buffers.readable = buffers.count
                buffers.readable_length += entry.length
            if not entry.flags & F_NEXT:
                return 0
            index = entry.next
            if index >= entries:
                return self._fail(NEXT_OUTSIDE)

    cdef int _add(self, Buffers *buffers, uint64_t gpa, uint32_t length) noexcept nogil:
        """A buffer that spans neighbouring regions becomes several vectors; an empty one none.

        ``gpa`` does not wrap: no region ends at 2^64.
        """
        cdef uint64_t here, left = length
        cdef uint8_t *hva
        while left:
            hva = self.memory.reach(gpa, &here)
            if hva == NULL:
                return self._fail(NOT_MEMORY)
            if here > left:
                here = left
            if _vector(self, buffers, hva, gpa, here) < 0:
                return -1
            gpa += here
            left -= here
        return 0

    cdef void complete(self, Buffers *buffers, uint32_t length) noexcept nogil:
        cdef uint64_t left = length, here
        cdef uint32_t index = buffers.readable
        if self.memory.tracked:
            while left and index < buffers.count:
                here = buffers.vectors[index].iov_len
                if here > left:
                    here = left
                self.memory.mark(buffers.gpas[index], here)
                left -= here
                index += 1
        self.put(buffers.head, length)

    cdef void put(self, uint16_t head, uint32_t length) noexcept nogil:
        if self.pages == NULL:
            _put(self, head, length, NULL)
            if self.notes != NULL:
                (<Note *>(self.notes + 1))[head].next = self.notes.last_batch_head
                # Release: who follows the heads from here finds the next one.
                store_release_u16(&self.notes.last_batch_head, head)
        elif self._enter():
            _put(self, head, length, self.pages)
            self.iommu.leave()

    cdef bint publish(self) noexcept nogil:
        cdef bint wanted
        if self.pages == NULL:
            return self._publish()
        if not self._enter():
            return False
        wanted = self._publish()
        self.iommu.leave()
        return wanted

    cdef bint _publish(self) noexcept nogil:
        cdef uint16_t event, before = self.signalled
        if before == self.next_used:
            return False
        # Release: the elements and the data are there before the index that covers them.
        store_release_u16(_used_at(self, 1, self.pages), self.next_used)
        if self.notes != NULL:
            self._strike(self.next_used - before)
        if self.memory.tracked:
            self._mark_used()
        # The index is seen before the driver's wish is read; else both sides could wait for each other.
        full_fence()
        self.signalled = self.next_used
        if self.event_idx:
            # Tell it if the index passed the event: all modulo 65536.
            event = load_u16(_avail_at(self, 2 + self.size, self.pages))
            return <uint16_t>(self.next_used - event - 1) < <uint16_t>(self.next_used - before)
        return not load_u16(_avail_at(self, 0, self.pages)) & NO_INTERRUPT

    cdef void flush(self) noexcept nogil:
        if self.publish():
            eventfd_signal(self.call_fd)

    cdef bint enable_kicks(self) noexcept nogil:
        cdef bint more
        if self.pages == NULL:
            return self._enable_kicks()
        if not self._enter():
            return True  # for ``take`` to tell
        more = self._enable_kicks()
        self.iommu.leave()
        return more

    cdef bint _enable_kicks(self) noexcept nogil:
        if self.event_idx:
            store_u16(_used_at(self, 2 + 4 * self.size, self.pages), self.next_avail)
        else:
            store_u16(_used_at(self, 0, self.pages), 0)
        if self.memory.tracked:
            self._mark_used()
        # The wish is seen before the index is read, for the same reason.
        full_fence()
        return load_u16(_avail_at(self, 1, self.pages)) != self.next_avail

    cdef void disable_kicks(self) noexcept nogil:
        """With EVENT_IDX nothing is to be done: an event index that is not moved on asks for no more kicks."""
        if self.event_idx:
            return
        if self.pages == NULL:
            self._disable_kicks()
        elif self._enter():
            self._disable_kicks()
            self.iommu.leave()

    cdef void _disable_kicks(self) noexcept nogil:
        store_u16(_used_at(self, 0, self.pages), NO_NOTIFY)
        if self.memory.tracked:
            self._mark_used()

    cdef void _mark_used(self) noexcept nogil:
        """Tell dirty tracking of the whole used ring."""
        cdef uint64_t gpa, here, left = 6 + 8 * <uint64_t>self.size, iova = self.used
        if self.pages == NULL:
            self.memory.mark(self.used, left)
            return
        while left:
            if self._find(iova, WRITE, &gpa, &here):
                return
            if here > left:
                here = left
            self.memory.mark(gpa, here)
            iova += here
            left -= here

    # -- behind a virtual IOMMU -------------------------------------------------------------------

    cdef bint _enter(self) noexcept nogil:
        """Begin to look at rings or chains, with what was found before still true or found again.

        False where the rings are mapped no more: the queue is broken, and ``leave`` is not to follow.
        """
        cdef uint32_t index
        self.iommu.enter()
        if self.mapped_at == self.iommu.generation:
            return True
        for index in range(WINDOWS):
            self.windows[index].access = 0
        if self._map_rings():
            self.mapped_at = self.iommu.generation
            return True
        self.iommu.leave()
        self._fail(RINGS_NOT_MAPPED)
        return False

    cdef bint _map_rings(self) noexcept nogil:
        cdef uint64_t size = self.size
        if not (
            self._map_ring(self.descriptors, size * DESCRIPTOR_SIZE, READ, self.pages)
            and self._map_ring(self.available, 6 + 2 * size, READ, &self.pages[self.first_avail_page])
            and self._map_ring(self.used, 6 + 8 * size, WRITE, &self.pages[self.first_used_page])
        ):
            return False
        # Who only looks whether the index moved does so at avail[1].
        self.avail = _avail_at(self, 1, self.pages) - 1
        self.used_ring = _used_at(self, 0, self.pages)
        return True

    cdef bint _map_ring(self, uint64_t iova, uint64_t length, uint32_t access, uint8_t **pages) noexcept nogil:
        """Find the pages of a ring; what is mapped is never less than a page."""
        cdef uint64_t gpa, left, here, inside
        cdef uint8_t *hva
        cdef int reason
        while length:
            inside = iova & (PAGE - 1)
            here = min(length, PAGE - inside)
            reason = self._find(iova, access, &gpa, &left)
            hva = self.memory.at(gpa, here) if reason == 0 and left >= here else NULL
            if hva == NULL:
                if reason:
                    self.iommu.report(reason, access, iova)
                return False
            pages[0] = hva - inside
            pages += 1
            iova += here
            length -= here
        return True

    cdef int _find(self, uint64_t iova, uint32_t access, uint64_t *gpa, uint64_t *here) noexcept nogil:
        """Where ``iova`` is, and how many bytes of its window follow (2^64 - 1 at most): 0, or the reason why not."""
        cdef uint32_t index
        cdef Window *window
        cdef int reason
        for index in range(WINDOWS):
            window = &self.windows[index]
            if window.access & access and iova - window.first <= window.last - window.first:
                break
        else:
            window = &self.windows[self.next_window]
            window.access = 0
            reason = self.iommu.find(iova, window)
            if reason:
                return reason
            self.next_window = (self.next_window + 1) % WINDOWS
            if not window.access & access:
                return NO_MAPPING
        gpa[0] = window.gpa + (iova - window.first)
        here[0] = window.last - iova
        if here[0] != <uint64_t>-1:
            here[0] += 1
        return 0

    cdef int _take_translated(self, Buffers *buffers) noexcept nogil:
        """As ``take``. After a ring full of refused chains it says that there is none now, so that no driver keeps a
        thread in here."""
        cdef uint32_t left = self.size
        cdef int got
        if self.fault:
            return -1
        while left:
            left -= 1
            if not self._enter():
                return -1
            self.refusing, self.last_byte = False, NULL
            got = _next(self, buffers, self.pages)
            if got <= 0 or not self.refusing:
                self.iommu.leave()
                self.since_refusal += got > 0
                return got
            if self.refusal >= 0 and self.last_byte != NULL:
                self.last_byte[0] = <uint8_t>self.refusal
                self.memory.mark(self.last_byte_gpa, 1)
            _put(self, buffers.head, 0, self.pages)
            self.refused += 1
            self.since_refusal = 0
            self.iommu.leave()
            self.flush()
        return 0

    cdef void _refuse(self, int reason, uint32_t access, uint64_t iova) noexcept nogil:
        """Report the first fault of a chain; the rest of it is only looked at for its last byte."""
        if not self.refusing:
            self.refusing = True
            self.iommu.report(reason, access, iova)

    cdef int _add_translated(self, Buffers *buffers, uint64_t iova, uint32_t length, uint32_t access) noexcept nogil:
        """As ``_add``, of IOVAs. What lies in one piece in guest memory is one vector, however it is mapped."""
        cdef uint64_t gpa, here, room, left = length, at = iova
        cdef uint32_t first = buffers.count
        cdef uint8_t *hva
        cdef int reason
        if self.refusing:
            # Vectors do not matter any more.
            buffers.count = buffers.readable = 0
        while left and not self.refusing:
            reason = self._find(at, access, &gpa, &here)
            if reason == 0 and here > left:
                here = left
            if reason:
                self._refuse(reason, access, at)
                break
            hva = self.memory.reach(gpa, &room)
            if hva == NULL:
                return self._fail(NOT_MEMORY)
            if here > room:
                here = room
            if buffers.count > first and (
                <uint8_t *>buffers.vectors[buffers.count - 1].iov_base + buffers.vectors[buffers.count - 1].iov_len
                == hva and buffers.gpas[buffers.count - 1] + buffers.vectors[buffers.count - 1].iov_len == gpa
            ):
                buffers.vectors[buffers.count - 1].iov_len += here
            elif buffers.count == MAX_BUFFERS:
                self._refuse(UNKNOWN, access, at)  # no driver can know how scattered its memory is
                break
            elif _vector(self, buffers, hva, gpa, here) < 0:
                return -1
            at += here
            left -= here
        if self.refusing and length and access == WRITE:
            self.last_byte = NULL
            if self._find(iova + length - 1, WRITE, &gpa, &here) == 0:
                self.last_byte, self.last_byte_gpa = self.memory.at(gpa, 1), gpa
        return 0

    cdef int _load_indirect(self, uint64_t iova, Descriptor *entry) noexcept nogil:
        """Load an entry of an indirect table, in whatever pieces: 1, or 0 for a chain that is refused, -1."""
        cdef uint8_t[DESCRIPTOR_SIZE] copy
        cdef uint32_t done = 0
        cdef uint64_t gpa, here
        cdef uint8_t *hva
        cdef int reason
        while done < DESCRIPTOR_SIZE:
            reason = self._find(iova + done, READ, &gpa, &here)
            if reason:
                self._refuse(reason, READ, iova + done)
                return 0
            here = min(here, <uint64_t>(DESCRIPTOR_SIZE - done))
            hva = self.memory.at(gpa, here)
            if hva == NULL:
                return self._fail(NOT_MEMORY)
            memcpy(&copy[done], hva, here)
            done += <uint32_t>here
        memcpy(entry, copy, DESCRIPTOR_SIZE)
        return 1

    # -- the Python face --------------------------------------------------------------------------

    def pop(self):
        """The next chain, or None. Raises GuestError for a broken ring."""
        cdef Chain chain
        cdef int got
        if not self.active:
            return None
        chain = Chain.__new__(Chain)
        got = self.take(&chain.buffers)
        if got < 0:
            raise GuestError(FAULTS[self.fault])
        if got == 0:
            return None
        chain.memory, chain.generation = self.memory, self.generation
        return chain

    def unpop(self, Chain chain not None):
        """Give back the chain that ``pop`` returned last, with none pushed since: the next ``pop`` finds it again."""
        if self.active and chain.generation == self.generation:
            self.untake(chain.buffers.head)
            chain.generation = 0

    def __iter__(self):
        """The chains that are there, and those that come while these are served: kicks are off meanwhile.

        After as many as the ring holds it kicks itself and ends: no driver keeps a thread for ever.
        """
        cdef uint32_t left = self.size
        if not self.active:
            return
        while True:
            self.disable_kicks()
            while (chain := self.pop()) is not None:
                yield chain
                left -= 1
                if left == 0:
                    eventfd_signal(self.kick_fd)
                    return
            if not self.active or not self.enable_kicks():
                return
            left -= 1  # refused chains are no chains, but they count
            if left == 0:
                eventfd_signal(self.kick_fd)
                return

    def push_used(self, Chain chain not None, uint32_t length=0):
        """The device is done with ``chain`` and wrote ``length`` bytes; seen by the driver after ``notify``.

        A chain of before a reset is forgotten, as is one that was pushed already.
        """
        if self.active and chain.generation == self.generation:
            chain.generation = 0
            self.complete(&chain.buffers, length)

    def notify(self):
        """Show the driver what was pushed, and interrupt it if it wants that."""
        if self.active:
            self.flush()

    def listen(self):
        """Ask for kicks; true where there are chains already."""
        return self.active and self.enable_kicks()

    @property
    def broken(self):
        """What the driver did wrong, or None."""
        return FAULTS.get(self.fault)

    def state(self):
        """All that the driver configured and where the rings stand; for an active queue no chain is in flight."""
        return {
            "size": self.size,
            "enabled": self.enabled,
            "descriptors": self.descriptors,
            "available": self.available,
            "used": self.used,
            "next_avail": self.next_avail,
            "next_used": self.next_used,
        }

    def restore(self, state):
        """Take ``state`` back, before ``activate``."""
        self.size, self.enabled = state["size"], state["enabled"]
        self.descriptors, self.available, self.used = state["descriptors"], state["available"], state["used"]
        self.avail_seen = self.next_avail = state["next_avail"]
        self.signalled = self.next_used = state["next_used"]


cdef class Chain:
    """One request: buffers that the device reads, then buffers that it writes. Every byte is guest memory."""

    cdef Buffers buffers
    cdef GuestMemory memory     # keeps the mapping alive
    cdef uint32_t generation    # of its queue when it was popped; 0, which no queue is at, once it went back

    def __cinit__(self):
        buffers_init(&self.buffers)

    def __dealloc__(self):
        buffers_free(&self.buffers)

    @property
    def head(self):
        return self.buffers.head

    @property
    def readable_len(self):
        """Bytes that the device may read."""
        return self.buffers.readable_length

    @property
    def writable_len(self):
        """Bytes that the device may write."""
        return self.buffers.writable_length

    @property
    def ranges(self):
        """(gpa, length, writable) of each buffer."""
        cdef uint32_t index
        return [
            (self.buffers.gpas[index], self.buffers.vectors[index].iov_len, index >= self.buffers.readable)
            for index in range(self.buffers.count)
        ]

    def read(self, size_t length=<size_t>-1, size_t offset=0):
        """Up to ``length`` readable bytes from ``offset`` on."""
        cdef size_t left, here, done = 0
        cdef uint32_t index
        cdef bytearray data
        cdef char *target
        left = 0 if offset >= self.buffers.readable_length else self.buffers.readable_length - offset
        data = bytearray(min(length, left))
        left = len(data)
        target = data
        for index in range(self.buffers.readable):
            here = self.buffers.vectors[index].iov_len
            if offset >= here:
                offset -= here
                continue
            here = min(here - offset, left)
            memcpy(target + done, <char *>self.buffers.vectors[index].iov_base + offset, here)
            done += here
            left -= here
            offset = 0
        return bytes(data)

    def write(self, bytes data not None, size_t offset=0):
        """Copy ``data`` to the writable bytes from ``offset`` on; returns how many there was room for."""
        cdef size_t here, done = 0, left = len(data)
        cdef uint32_t index
        cdef const char *source = data
        for index in range(self.buffers.readable, self.buffers.count):
            here = self.buffers.vectors[index].iov_len
            if offset >= here:
                offset -= here
                continue
            here = min(here - offset, left)
            if here == 0:
                break
            memcpy(<char *>self.buffers.vectors[index].iov_base + offset, source + done, here)
            self.memory.mark(self.buffers.gpas[index] + offset, here)
            done += here
            left -= here
            offset = 0
        return done

    def read_to(self, int fd, uint64_t at, size_t length, size_t offset=0):
        """Write up to ``length`` readable bytes from ``offset`` on to file ``fd`` from its byte ``at`` on.

        How many it took. Raises OSError. Nothing is copied here, and other threads run meanwhile.
        """
        return self._transfer(fd, at, length, offset, False)

    def write_from(self, int fd, uint64_t at, size_t length, size_t offset=0):
        """Fill up to ``length`` writable bytes from ``offset`` on from file ``fd``, likewise."""
        return self._transfer(fd, at, length, offset, True)

    cdef object _transfer(self, int fd, uint64_t at, size_t length, size_t offset, bint into):
        cdef uint32_t index = self.buffers.readable if into else 0
        cdef uint32_t end = self.buffers.count if into else self.buffers.readable
        cdef uint32_t first = index, count = 0
        cdef iovec[MAX_BUFFERS] vectors
        cdef size_t here
        cdef ssize_t done = 0
        cdef int number = 0
        if at >> 63 or length >> 62:
            raise OSError(EINVAL, "an offset that no file has")
        while index < end and length:
            here = self.buffers.vectors[index].iov_len
            if offset >= here:
                offset -= here
                index += 1
                first = index
                continue
            vectors[count].iov_base = <char *>self.buffers.vectors[index].iov_base + offset
            vectors[count].iov_len = min(here - offset, length)
            length -= vectors[count].iov_len
            count += 1
            offset = 0
            index += 1
        if count:
            with nogil:
                done = preadv(fd, vectors, count, at) if into else pwritev(fd, vectors, count, at)
                number = errno
            if done < 0:
                raise OSError(number, "")
        if into:
            self._mark(first, vectors, done)
        return done

    cdef void _mark(self, uint32_t first, iovec *vectors, size_t length) noexcept:
        """So many bytes of ``vectors`` were written, the first of which lies in buffer ``first``."""
        cdef uint32_t index = 0
        cdef size_t here, skipped
        while length:
            here = min(<size_t>vectors[index].iov_len, length)
            skipped = <char *>vectors[index].iov_base - <char *>self.buffers.vectors[first + index].iov_base
            self.memory.mark(self.buffers.gpas[first + index] + skipped, here)
            length -= here
            index += 1

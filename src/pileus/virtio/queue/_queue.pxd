cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pileus._posix cimport iovec
from pileus.memory._space cimport GuestMemory, Region, Translation, Window


cdef enum:
    MAX_BUFFERS = 1024  # of one chain, indirect ones included: what preadv and writev take (IOV_MAX)
    WINDOWS = 4         # of the virtual IOMMU's that are remembered


cdef struct Descriptor:     # virtio 1.2, 2.7.5
    uint64_t gpa
    uint32_t length
    uint16_t flags
    uint16_t next


cdef struct UsedElement:    # virtio 1.2, 2.7.8
    uint32_t head
    uint32_t length


cdef struct Buffers:
    # One chain, checked whole: every byte named here is guest memory. Made empty by ``buffers_init``, filled
    # by ``Queue.take``, freed by ``buffers_free``; grows to the longest chain it ever held.
    iovec *vectors              # those that the device reads come first
    uint64_t *gpas              # where each begins, for dirty tracking
    uint32_t capacity
    uint32_t readable           # vectors that the device reads
    uint32_t count              # all vectors
    uint64_t readable_length    # bytes
    uint64_t writable_length
    uint16_t head


cdef struct Note:           # vhost-user, Inflight I/O tracking: struct DescStateSplit
    uint8_t inflight
    uint8_t padding[5]
    uint16_t next
    uint64_t counter


cdef struct Notes:          # QueueRegionSplit; a Note for each descriptor follows
    uint64_t features
    uint16_t version
    uint16_t count
    uint16_t last_batch_head
    uint16_t used_index


cdef void buffers_init(Buffers *buffers) noexcept nogil
cdef void buffers_free(Buffers *buffers) noexcept nogil


@cython.final  # its methods call each other without a detour
cdef class Queue:
    cdef readonly uint16_t max_size
    cdef readonly int kick_fd       # eventfd, non-blocking: the driver has offered something
    cdef public int call_fd         # eventfd: tells the driver; the transport's, -1 while there is none
    # What the driver configures while the queue is not active.
    cdef public uint16_t size
    cdef public bint enabled
    cdef public uint64_t descriptors
    cdef public uint64_t available
    cdef public uint64_t used
    # While active.
    cdef readonly bint active
    cdef readonly uint32_t generation
    cdef GuestMemory memory
    cdef Descriptor *table
    cdef uint16_t *avail            # flags, idx, ring[size], used_event
    cdef uint16_t *used_ring        # flags, idx, ring[size] of UsedElement, avail_event
    cdef uint16_t avail_seen        # the available index when it was last looked at
    cdef uint16_t next_avail
    cdef uint16_t next_used
    cdef uint16_t signalled         # next_used when it was last considered to tell the driver
    cdef bint event_idx
    cdef bint indirect
    cdef int fault                  # what the driver did wrong; nothing moves any more
    # What is under way, in memory that outlives this process; NULL where nobody wants to know.
    cdef Notes *notes
    cdef Region notes_region
    cdef uint64_t notes_counter
    cdef uint16_t *again            # heads that a process before this one had taken, to be taken again
    cdef uint32_t again_count
    cdef uint32_t again_next
    cdef bint took_again            # the last chain was one of them

    # While active behind a virtual IOMMU, when all addresses are IOVAs.
    cdef Translation iommu          # None: addresses are GPAs
    cdef uint64_t mapped_at         # the generation that what follows is true for
    cdef Window[WINDOWS] windows
    cdef uint32_t next_window
    cdef uint8_t **pages            # where each page of descriptor table, avail ring and used ring is; NULL: in one
    cdef uint32_t first_avail_page  # in ``pages``
    cdef uint32_t first_used_page
    cdef public int refusal         # what goes into the last byte of a chain that was refused; -1: nothing
    cdef readonly uint64_t refused  # chains that touched what is not mapped
    cdef bint refusing              # the chain at hand is one
    cdef uint8_t *last_byte         # … and its last byte, if the device may write it
    cdef uint64_t last_byte_gpa
    cdef uint64_t since_refusal     # chains taken since, and not given back

    # The next chain: 1, 0 for none now, -1 for a broken ring (see ``fault``).
    cdef int take(self, Buffers *buffers) noexcept nogil
    # Give the last chain back, as if it had not been taken: only with none completed or taken since. Where one that
    # came after it was refused meanwhile, the driver gets it back unused.
    cdef void untake(self, uint16_t head) noexcept nogil
    # The device is done with a chain and wrote ``length`` bytes, from the first writable one on.
    cdef void complete(self, Buffers *buffers, uint32_t length) noexcept nogil
    # Likewise for receivers that spread one packet over chains: not visible to the driver before ``publish``.
    cdef void put(self, uint16_t head, uint32_t length) noexcept nogil
    # Show the driver what was completed; true where it wants to be told.
    cdef bint publish(self) noexcept nogil
    # publish, and tell it if it wants that.
    cdef void flush(self) noexcept nogil
    # Ask for kicks; true where a chain came in before the driver could know.
    cdef bint enable_kicks(self) noexcept nogil
    cdef void disable_kicks(self) noexcept nogil
    cdef uint16_t pending(self) noexcept nogil
    cdef int _take_translated(self, Buffers *buffers) noexcept nogil
    cdef bint _publish(self) noexcept nogil
    cdef bint _enable_kicks(self) noexcept nogil
    cdef void _disable_kicks(self) noexcept nogil
    cdef void _mark_used(self) noexcept nogil
    cdef bint _enter(self) noexcept nogil
    cdef bint _map_rings(self) noexcept nogil
    cdef bint _map_ring(self, uint64_t iova, uint64_t length, uint32_t access, uint8_t **pages) noexcept nogil
    cdef int _find(self, uint64_t iova, uint32_t access, uint64_t *gpa, uint64_t *here) noexcept nogil
    cdef void _refuse(self, int reason, uint32_t access, uint64_t iova) noexcept nogil
    cdef int _add_translated(self, Buffers *buffers, uint64_t iova, uint32_t length, uint32_t access) noexcept nogil
    cdef int _load_indirect(self, uint64_t iova, Descriptor *entry) noexcept nogil
    cdef int _walk(self, uint16_t head, Buffers *buffers, uint8_t **pages) noexcept nogil
    cdef int _add(self, Buffers *buffers, uint64_t gpa, uint32_t length) noexcept nogil
    cdef int _fail(self, int fault) noexcept nogil
    cdef int _take_again(self, Buffers *buffers) noexcept nogil
    cdef void _strike(self, uint16_t count) noexcept nogil

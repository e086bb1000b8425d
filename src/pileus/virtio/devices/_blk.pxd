from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pileus._posix cimport iovec
from pileus.block._image cimport Extent, Image
from pileus.block._transfer cimport Cursor
from pileus.block._uring cimport Ring
from pileus.block._workers cimport Job, Workers
from pileus.virtio.queue._engine cimport Engine
from pileus.virtio.queue._queue cimport Buffers, Queue


cdef enum:
    SEGMENTS = 16   # of one DISCARD or WRITE_ZEROES


cdef struct Segment:        # virtio 1.2, 5.2.6: struct virtio_blk_discard_write_zeroes
    uint64_t sector
    uint32_t sectors
    uint32_t flags


cdef struct Request:
    # One chain under way, on the ring or with a worker, a piece of it at a time.
    Job job                 # first: a worker's Job is the Request
    Request *next           # of those that are free
    void *owner             # the BlkQueue
    Buffers chain
    uint8_t *status         # in guest memory, as is ``status_gpa``
    uint64_t status_gpa
    uint32_t kind           # the request's type
    uint64_t room           # bytes of data that the driver has room for
    uint64_t moved          # bytes of data that the driver has got
    uint32_t segments
    bint mapped             # the extent is to be released
    bint durable            # a write that counts once it is on stable storage
    bint to_sync            # … and some of it is not there yet
    int result              # what a worker has to say: 0 or -errno
    uint64_t offset         # on the disk, of what is left, in bytes
    uint64_t left
    Cursor cursor           # in the chain's vectors, at what is left
    Extent extent           # the piece that moves now
    iovec *piece            # its vectors: those of the chain, or a copy of some
    int pieces
    iovec *copies
    int capacity            # of ``copies``
    Segment[SEGMENTS] ranges


cdef class BlkQueue(Engine):
    cdef Queue queue
    cdef Image image
    cdef bint threads               # no io_uring, even if there is one
    cdef public bint writethrough   # each write is durable before it is told to be done
    cdef readonly str io            # what moves the bytes: "io_uring" or "threads"
    cdef readonly uint64_t requests
    cdef readonly uint64_t errors
    cdef char[20] serial
    cdef uint64_t size              # of the disk, in bytes
    cdef uint32_t align             # of direct I/O, 1: none
    cdef int done_fd                # eventfd: a worker has done something
    cdef int bad                    # what the driver did wrong, beside what the queue finds
    cdef Ring ring
    cdef bint has_ring
    cdef bint fixed                 # the image's descriptor is fixed file 0
    cdef bint once                  # polls are to be asked for again each time: before Linux 5.13
    cdef Workers *workers
    cdef Request *all
    cdef Request *free_requests
    cdef uint32_t in_flight
    cdef uint32_t jobs              # of them with workers
    cdef uint32_t misses            # times in a row that it did not help to stay awake
    cdef uint32_t skips             # sleeps until that is tried again
    cdef bint stopping
    cdef bint late                  # what was cancelled has still not come back
    cdef uint64_t guarded

    cdef int _prepare(self) noexcept nogil
    cdef void _give_back(self) noexcept nogil
    cdef int _serve_ring(self) noexcept nogil
    cdef int _serve_threads(self) noexcept nogil
    cdef bint _linger(self) noexcept nogil
    cdef int _take(self) noexcept nogil
    cdef int _start(self, Request *request) noexcept nogil
    cdef bint _parse_segments(self, Request *request) noexcept nogil
    cdef void _step(self, Request *request) noexcept nogil
    cdef bint _choose_piece(self, Request *request) noexcept nogil
    cdef bint _submit_piece(self, Request *request) noexcept nogil
    cdef void _moved(self, Request *request, uint64_t length) noexcept nogil
    cdef void _sync(self, Request *request) noexcept nogil
    cdef void _hand_over(self, Request *request) noexcept nogil
    cdef void _ring_result(self, Request *request, int result) noexcept nogil
    cdef uint32_t _collect(self) noexcept nogil
    cdef uint32_t _reap(self) noexcept nogil
    cdef void _noticed(self, uint64_t what, int result, uint32_t flags) noexcept nogil
    cdef void _watch(self, int fd, uint64_t what) noexcept nogil
    cdef void _patience(self, uint64_t what) noexcept nogil
    cdef void _release(self, Request *request) noexcept nogil
    cdef void _finish(self, Request *request, int result) noexcept nogil
    cdef void _answer(self, Request *request, uint8_t status) noexcept nogil

# cython: cdivision=True
"""A queue of virtio-blk, served by one thread without the GIL.

Requests go to io_uring where their bytes lie in a file as they are, and to a few worker threads where the
image has more to do, or where there is no io_uring. One turn of the loop takes all that the driver offers,
enters the kernel once, and tells the driver once of all that is done. The thread sleeps in one place only.

What is done with a chain is bounded by its length; how many are under way, by the queue's size. Chains are
parsed from copies, and their data is moved by the kernel; nothing that the driver changes later matters.

Source: virtio 1.2, 5.2.6 (Block Device: Device Operation)
"""

import os

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP, EPROTO
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from pileus._posix cimport eventfd_consume, iovec, load_u16
from pileus.block._image cimport EXTENT_DATA, EXTENT_OTHER, EXTENT_ZERO, Image
from pileus.block._transfer cimport cursor_drain, cursor_fill, cursor_skip, cursor_start, cursor_take, cursor_zero
from pileus.block._uring cimport (
    IORING_ASYNC_CANCEL_ANY,
    IORING_CQE_F_MORE,
    IORING_FSYNC_DATASYNC,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_FSYNC,
    IORING_OP_POLL_ADD,
    IORING_OP_READ,
    IORING_OP_READV,
    IORING_OP_TIMEOUT,
    IORING_OP_WRITE,
    IORING_OP_WRITEV,
    IORING_POLL_ADD_MULTI,
    IOSQE_FIXED_FILE,
    io_uring_cqe,
    io_uring_sqe,
    ring_close,
    ring_enter,
    ring_fix_file,
    ring_held_back,
    ring_next,
    ring_open,
    ring_peek,
    ring_seen,
)
from pileus.block._workers cimport Job, workers_done, workers_free, workers_new, workers_submit
from pileus.virtio.queue._engine cimport Engine
from pileus.virtio.queue._queue cimport MAX_BUFFERS, Queue, buffers_free, buffers_init


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int milliseconds)
    short POLLIN


cdef extern from *:
    """
    #define pileus_cpu_relax() __builtin_ia32_pause()
    """
    void cpu_relax "pileus_cpu_relax"() nogil


cdef extern from "<linux/fs.h>":
    uint32_t RWF_DSYNC


cdef extern from "<linux/time_types.h>":
    struct __kernel_timespec:
        long long tv_sec
        long long tv_nsec


cdef enum:
    SECTOR = 512            # what the driver counts in, whatever the blocks of the disk
    HEADER_SIZE = 16
    SERIAL_SIZE = 20
    UNMAP = 1               # flag of a segment of WRITE_ZEROES
    WORKERS = 4             # threads at most, of one queue
    TURN = 1 << 20          # bytes, about: the driver hears of them while the next are being moved
    LINGER = 1000           # looks at the ring before it sleeps, some 40 us
    MOST_SKIPS = 64         # sleeps without such looks
    PATIENCE = 10           # seconds for what is under way at the end; again as long for it to be cancelled

cdef enum:                  # types of requests
    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13

cdef enum:                  # how they end
    S_OK = 0
    S_IOERR = 1
    S_UNSUPP = 2

cdef enum:                  # ``user_data`` of what is no Request
    NOBODY
    KICKED
    TOLD_TO_STOP
    WORKER_DONE
    OUT_OF_PATIENCE
    LOST

cdef enum:                  # Beside the queue's own faults
    NOT_BAD
    NO_HEADER
    NO_STATUS

BADS = {
    NO_HEADER: "a request has less than the 16 bytes of its header (5.2.6)",
    NO_STATUS: "a request has no byte for its status (5.2.6)",
}
MAX_SEGMENTS = SEGMENTS

cdef __kernel_timespec patience
patience.tv_sec, patience.tv_nsec = PATIENCE, 0


cdef struct Header:         # struct virtio_blk_req
    uint32_t kind
    uint32_t reserved
    uint64_t sector


cdef class BlkQueue(Engine):
    """Serves ``queue`` from ``image`` between ``start`` and ``stop``, which waits for what is under way.

    ``serial`` is what GET_ID answers, up to 20 bytes. ``threads``: do without io_uring.
    """

    def __cinit__(self, *_, **__):
        self.done_fd = -1

    def __init__(self, str name, Queue queue not None, Image image not None, bytes serial not None, failed,
                 bint threads=False):
        super().__init__(name, failed)
        self.queue, self.image, self.threads = queue, image, threads
        self.size, self.guarded = image.size, image.guarded
        self.align = image.logical_block if image.direct else 1
        self.io = "threads" if threads else "io_uring"
        queue.refusal = S_IOERR
        memset(self.serial, 0, SERIAL_SIZE)
        memcpy(self.serial, <const char *>serial, min(len(serial), SERIAL_SIZE))
        self.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self):
        super().close()
        if self.done_fd >= 0:
            os.close(self.done_fd)
            self.done_fd = -1

    @property
    def fault(self):
        """What the driver did wrong, or None."""
        return BADS.get(self.bad) or self.queue.broken

    # -- the life of the thread -------------------------------------------------------------------

    cdef int serve(self) noexcept nogil:
        cdef int rc = self._prepare()
        if rc == 0:
            if self.has_ring:
                rc = self._serve_ring()
            else:
                with gil:
                    self.io = "threads"
                rc = self._serve_threads()
            self.queue.flush()
        self._give_back()
        return rc

    cdef int _prepare(self) noexcept nogil:
        """All that requests will need, so that later nothing can fail for want of memory."""
        cdef uint32_t index, count = self.queue.size
        self.bad, self.stopping, self.late, self.once = NOT_BAD, False, False, False
        self.in_flight = self.jobs = self.misses = self.skips = 0
        self.free_requests, self.workers = NULL, NULL
        self.has_ring = not self.threads and ring_open(&self.ring, 2 * count + 8) == 0
        self.fixed = self.has_ring and ring_fix_file(&self.ring, self.image.fd) == 0
        self.all = <Request *>calloc(count, sizeof(Request))
        if self.all == NULL:
            return -ENOMEM
        for index in range(count):
            self.all[index].owner = <void *>self
            self.all[index].job.run = _work
            buffers_init(&self.all[index].chain)
            self.all[index].next = self.free_requests
            self.free_requests = &self.all[index]
        return 0

    cdef void _give_back(self) noexcept nogil:
        cdef uint32_t index
        if self.has_ring:
            ring_close(&self.ring)
            self.has_ring = False
        if self.in_flight:
            return  # a disk that hangs: its requests are lost, and what they point at must stay
        workers_free(self.workers)
        self.workers = NULL
        if self.all != NULL:
            for index in range(self.queue.size):
                buffers_free(&self.all[index].chain)
                free(self.all[index].copies)
            free(self.all)
            self.all = NULL

    cdef int _serve_ring(self) noexcept nogil:
        cdef int taken, rc
        cdef bint patient = True
        self._watch(self.queue.kick_fd, KICKED)
        self._watch(self.stop_fd, TOLD_TO_STOP)
        self._watch(self.done_fd, WORKER_DONE)
        self.queue.disable_kicks()
        while True:
            taken = self._take()
            if self.ring.pending or ring_held_back(&self.ring):
                rc = ring_enter(&self.ring, 0)
                if rc < 0:
                    return rc
            if self._reap() + self._collect() + taken:
                self.queue.flush()
                continue
            if self.stopping:
                if self.in_flight == 0 or self.late and self.jobs == 0:
                    return -EPROTO if self.bad or self.queue.fault else 0
                if patient:
                    patient = False
                    self._patience(OUT_OF_PATIENCE)
            elif self.free_requests != NULL and (self._linger() or self.queue.enable_kicks()):
                self.queue.disable_kicks()
                continue
            rc = ring_enter(&self.ring, 1)
            if rc < 0:
                return rc
            self.queue.disable_kicks()

    cdef bint _linger(self) noexcept nogil:
        """Stay awake for a moment: true where the driver offers more. The longer that did not help, the
        less often it is tried."""
        cdef int turn
        if self.in_flight:
            return False
        if self.skips:
            self.skips -= 1
            return False
        for turn in range(LINGER):
            if load_u16(&self.queue.avail[1]) != self.queue.next_avail:
                self.misses = 0
                return True
            cpu_relax()
        self.misses = min(self.misses + 1, <uint32_t>MOST_SKIPS)
        self.skips = self.misses
        return False

    cdef int _serve_threads(self) noexcept nogil:
        cdef pollfd[3] fds
        cdef int taken
        fds[0].fd, fds[1].fd, fds[2].fd = self.stop_fd, self.done_fd, self.queue.kick_fd
        fds[0].events = fds[1].events = fds[2].events = POLLIN
        self.queue.disable_kicks()
        while True:
            taken = self._take()
            if self._collect() + taken:
                self.queue.flush()
                continue
            if self.stopping:
                if self.in_flight == 0:
                    return -EPROTO if self.bad or self.queue.fault else 0
                poll(&fds[1], 1, -1)
                eventfd_consume(self.done_fd)
                continue
            if self.free_requests != NULL and self.queue.enable_kicks():
                self.queue.disable_kicks()
                continue
            fds[0].revents = fds[1].revents = fds[2].revents = 0
            poll(fds, 3, -1)
            self.queue.disable_kicks()
            if fds[0].revents:
                self.stopping = True
            if fds[1].revents:
                eventfd_consume(self.done_fd)
            if fds[2].revents:
                eventfd_consume(self.queue.kick_fd)

    # -- from the driver --------------------------------------------------------------------------

    cdef int _take(self) noexcept nogil:
        """Begin what is offered, up to what one turn of the loop should move; how many."""
        cdef Request *request
        cdef int got, taken = 0
        cdef uint64_t length = 0
        while not self.stopping and self.free_requests != NULL and length < TURN:
            request = self.free_requests
            got = self.queue.take(&request.chain)
            if got == 0:
                break
            if got < 0 or self._start(request) < 0:
                self.stopping = True  # what is under way may end
                break
            taken += 1
            length += request.chain.readable_length + request.chain.writable_length
        return taken

    cdef int _start(self, Request *request) noexcept nogil:
        """-1 for a chain that is no request, which nobody can answer."""
        cdef Header header
        cdef iovec *last
        if request.chain.readable_length < HEADER_SIZE:
            self.bad = NO_HEADER
            return -1
        if request.chain.writable_length == 0:
            self.bad = NO_STATUS
            return -1
        # The status is the last byte that the device may write, wherever buffers begin and end.
        last = &request.chain.vectors[request.chain.count - 1]
        last.iov_len -= 1
        request.status = <uint8_t *>last.iov_base + last.iov_len
        request.status_gpa = request.chain.gpas[request.chain.count - 1] + last.iov_len
        request.room = request.chain.writable_length - 1
        cursor_start(&request.cursor, request.chain.vectors, request.chain.readable)
        cursor_drain(&request.cursor, &header, HEADER_SIZE)
        self.free_requests = request.next
        self.in_flight += 1
        request.kind, request.moved, request.mapped = header.kind, 0, False
        request.durable = request.to_sync = False
        request.left = 0
        if header.kind == OUT:
            request.left = request.chain.readable_length - HEADER_SIZE
            request.durable, request.to_sync = self.writethrough, False
            if request.cursor.done == request.cursor.vectors.iov_len:  # past a header of its own
                request.cursor.vectors += 1
                request.cursor.count -= 1
                request.cursor.done = 0
        elif header.kind == IN:
            request.left = request.chain.writable_length - 1
            cursor_start(
                &request.cursor,
                request.chain.vectors + request.chain.readable,
                request.chain.count - request.chain.readable,
            )
        elif header.kind == FLUSH:
            self._sync(request)
            return 0
        elif header.kind == GET_ID:
            cursor_start(
                &request.cursor,
                request.chain.vectors + request.chain.readable,
                request.chain.count - request.chain.readable,
            )
            request.moved = min(request.room, <uint64_t>SERIAL_SIZE)
            cursor_fill(&request.cursor, self.serial, request.moved)
            self._answer(request, S_OK)
            return 0
        elif header.kind == DISCARD or header.kind == WRITE_ZEROES:
            if self._parse_segments(request):
                self._hand_over(request)
            return 0
        else:
            self._answer(request, S_UNSUPP)
            return 0
        # Subtractions cannot wrap: what is in range is compared first.
        if (
            request.left % SECTOR
            or request.left > self.size
            or header.sector > (self.size - request.left) // SECTOR
            or (header.kind == OUT and self.image.readonly)
        ):
            self._finish(request, -EIO)
            return 0
        request.offset = header.sector * SECTOR
        self._step(request)
        return 0

    cdef bint _parse_segments(self, Request *request) noexcept nogil:
        """Whether the segments are fit to be worked on; if not, the request was answered."""
        cdef uint64_t length = request.chain.readable_length - HEADER_SIZE
        cdef uint32_t index, known = UNMAP if request.kind == WRITE_ZEROES else 0
        cdef uint64_t sectors = self.size // SECTOR
        cdef Segment *segment
        cdef uint8_t status = S_OK
        if request.kind == DISCARD and not self.image.can_discard and not self.image.readonly:
            status = S_UNSUPP
        elif self.image.readonly or length == 0 or length % sizeof(Segment) or length > SEGMENTS * sizeof(Segment):
            status = S_IOERR
        else:
            cursor_drain(&request.cursor, request.ranges, length)
            request.segments = <uint32_t>(length // sizeof(Segment))
            for index in range(request.segments):
                segment = &request.ranges[index]
                if segment.flags & ~known:
                    status = S_UNSUPP
                elif segment.sectors > sectors or segment.sector > sectors - segment.sectors:
                    if status == S_OK:
                        status = S_IOERR
        if status != S_OK:
            self.errors += 1
            self._answer(request, status)
        return status == S_OK

    # -- piece by piece ---------------------------------------------------------------------------

    cdef void _step(self, Request *request) noexcept nogil:
        """Move what is left of IN or OUT: as far as it goes at once, then the next piece for somebody else."""
        while request.left:
            if self.image.plain and request.offset >= self.guarded or self.image.plain and request.kind == IN:
                request.extent.kind, request.extent.fd = EXTENT_DATA, self.image.fd
                request.extent.offset, request.extent.length = request.offset, request.left
            elif not self._choose_piece(request):
                return
            if request.extent.kind != EXTENT_ZERO:
                if not self._submit_piece(request):
                    self._finish(request, -ENOMEM)
                return
            cursor_zero(&request.cursor, request.extent.length)
            self._moved(request, request.extent.length)
            self._release(request)
        if request.to_sync:
            self._sync(request)
        else:
            self._finish(request, 0)

    cdef bint _choose_piece(self, Request *request) noexcept nogil:
        """Ask the image; where it cannot say, the request was answered."""
        cdef int rc
        cdef bint write = request.kind == OUT
        if not self.has_ring:
            request.extent.kind, request.extent.length = EXTENT_OTHER, request.left
            return True
        rc = self.image.map(request.offset, request.left, write, &request.extent)
        if rc < 0:
            self._finish(request, rc)
            return False
        request.mapped = True
        if not 0 < request.extent.length <= request.left or write and request.extent.kind == EXTENT_ZERO:
            self._finish(request, -EIO)
            return False
        return True

    cdef bint _submit_piece(self, Request *request) noexcept nogil:
        """Start moving ``extent``, which may be shorter than it was after a short read or write."""
        cdef io_uring_sqe *sqe
        cdef iovec *grown
        cdef size_t taken
        cdef uint64_t all
        cdef int index
        if request.cursor.done == 0 and request.extent.length == request.left:
            request.piece, request.pieces = <iovec *>request.cursor.vectors, request.cursor.count
            if request.pieces and request.piece[request.pieces - 1].iov_len == 0:
                request.pieces -= 1  # the status had that buffer to itself
        else:
            if request.capacity < request.cursor.count:
                grown = <iovec *>realloc(request.copies, request.cursor.count * sizeof(iovec))
                if grown == NULL:
                    return False
                request.copies, request.capacity = grown, request.cursor.count
            request.piece = request.copies
            request.pieces = cursor_take(
                &request.cursor, request.extent.length, request.copies, request.capacity, &taken
            )
        if request.extent.kind != EXTENT_DATA or not self.has_ring:
            self._hand_over(request)
            return True
        if self.align > 1:
            all = request.extent.offset | request.extent.length
            for index in range(request.pieces):
                all |= <uintptr_t>request.piece[index].iov_base | request.piece[index].iov_len
            if all & (self.align - 1):
                self._hand_over(request)
                return True
        sqe = ring_next(&self.ring)
        if sqe == NULL:
            return False
        if request.pieces == 1:
            sqe.opcode = IORING_OP_WRITE if request.kind == OUT else IORING_OP_READ
            sqe.addr, sqe.len = <uintptr_t>request.piece.iov_base, <uint32_t>request.piece.iov_len
        else:
            sqe.opcode = IORING_OP_WRITEV if request.kind == OUT else IORING_OP_READV
            sqe.addr, sqe.len = <uintptr_t>request.piece, request.pieces
        sqe.fd, sqe.off, sqe.user_data = request.extent.fd, request.extent.offset, <uintptr_t>request
        if self.fixed and sqe.fd == self.image.fd:
            sqe.fd, sqe.flags = 0, IOSQE_FIXED_FILE
        if request.durable and self.image.plain:
            sqe.rw_flags = RWF_DSYNC
        elif request.durable:
            request.to_sync = True
        return True

    cdef void _moved(self, Request *request, uint64_t length) noexcept nogil:
        request.offset += length
        request.left -= length
        if request.kind == IN:
            request.moved += length

    cdef void _sync(self, Request *request) noexcept nogil:
        """The rest of a FLUSH, or of a write that has to be durable."""
        cdef io_uring_sqe *sqe
        request.to_sync = False
        request.kind = FLUSH
        sqe = ring_next(&self.ring) if self.has_ring and self.image.plain else NULL
        if sqe == NULL:
            self._hand_over(request)
            return
        sqe.opcode, sqe.fsync_flags = IORING_OP_FSYNC, IORING_FSYNC_DATASYNC
        sqe.fd, sqe.user_data = self.image.fd, <uintptr_t>request
        if self.fixed:
            sqe.fd, sqe.flags = 0, IOSQE_FIXED_FILE

    cdef void _hand_over(self, Request *request) noexcept nogil:
        """To a worker: ``_work``."""
        cdef int rc
        request.to_sync = request.durable
        if self.workers == NULL:
            self.workers = workers_new(WORKERS, self.done_fd)
        rc = -ENOMEM if self.workers == NULL else workers_submit(self.workers, &request.job)
        if rc < 0:
            self._finish(request, rc)
        else:
            self.jobs += 1

    # -- and back ---------------------------------------------------------------------------------

    cdef uint32_t _reap(self) noexcept nogil:
        """See to what the ring has completed; how much there was."""
        cdef io_uring_cqe *cqe = ring_peek(&self.ring)
        cdef io_uring_sqe *sqe
        cdef uint64_t what
        cdef uint32_t flags, count = 0
        cdef int result
        while cqe != NULL:
            what, result, flags = cqe.user_data, cqe.res, cqe.flags
            ring_seen(&self.ring)
            count += 1
            if what > LOST:
                self._ring_result(<Request *>what, result)
            elif what == OUT_OF_PATIENCE:
                sqe = ring_next(&self.ring)
                if sqe != NULL:
                    sqe.opcode, sqe.cancel_flags = IORING_OP_ASYNC_CANCEL, IORING_ASYNC_CANCEL_ANY
                    self._patience(LOST)
            elif what == LOST:
                self.late = True
            elif what != NOBODY:
                self._noticed(what, result, flags)
            cqe = ring_peek(&self.ring)
        return count

    cdef void _noticed(self, uint64_t what, int result, uint32_t flags) noexcept nogil:
        """A descriptor that is watched became readable, or watching it failed."""
        if what == TOLD_TO_STOP and result > 0:
            self.stopping = True
        if flags & IORING_CQE_F_MORE:
            return
        if result == -EINVAL and not self.once:
            self.once = True
        elif result < 0:
            self.stopping = True
        if what == WORKER_DONE:
            self._watch(self.done_fd, what)
        elif not self.stopping:
            self._watch(self.queue.kick_fd if what == KICKED else self.stop_fd, what)

    cdef void _ring_result(self, Request *request, int result) noexcept nogil:
        if result < 0:
            if result == -EINTR or result == -EAGAIN:
                if request.kind == FLUSH:
                    self._sync(request)
                elif not self._submit_piece(request):
                    self._finish(request, -ENOMEM)
            else:
                self._finish(request, result)
            return
        if request.kind == FLUSH:
            self._finish(request, 0)
            return
        if result == 0 or <uint64_t>result > request.extent.length:
            self._finish(request, -EIO)  # the file has become shorter
            return
        self._moved(request, result)
        request.extent.length -= result
        if request.extent.length:
            request.extent.offset += result
            cursor_skip(&request.cursor, result)
            if not self._submit_piece(request):
                self._finish(request, -ENOMEM)
            return
        self._release(request)
        if request.left:
            cursor_skip(&request.cursor, result)
        self._step(request)

    cdef uint32_t _collect(self) noexcept nogil:
        """See to what workers have done; how much there was."""
        cdef Job *job = workers_done(self.workers)
        cdef Job *after
        cdef Request *request
        cdef uint32_t count = 0
        while job != NULL:
            after = job.next
            request = <Request *>job
            count += 1
            self.jobs -= 1
            if request.result < 0 or (request.kind != IN and request.kind != OUT):
                self._finish(request, request.result)
            else:
                self._moved(request, request.extent.length)
                self._release(request)
                cursor_skip(&request.cursor, request.extent.length)
                self._step(request)
            job = after
        return count

    cdef void _release(self, Request *request) noexcept nogil:
        if request.mapped:
            self.image.release()
            request.mapped = False

    cdef void _finish(self, Request *request, int result) noexcept nogil:
        self._release(request)
        if result < 0:
            self.errors += 1
        self._answer(request, S_OK if result >= 0 else S_UNSUPP if result == -EOPNOTSUPP else S_IOERR)

    cdef void _answer(self, Request *request, uint8_t status) noexcept nogil:
        cdef uint64_t here, length, left = request.moved
        cdef uint32_t index = request.chain.readable
        request.status[0] = status
        if self.queue.memory.tracked:
            while left and index < request.chain.count:
                here = min(<uint64_t>request.chain.vectors[index].iov_len, left)
                self.queue.memory.mark(request.chain.gpas[index], here)
                left -= here
                index += 1
            self.queue.memory.mark(request.status_gpa, 1)
        # The length covers the status only where no byte before it is missing (2.7.8.2).
        length = request.moved + (request.moved == request.room)
        self.queue.put(request.chain.head, <uint32_t>min(length, <uint64_t>0xFFFFFFFF))
        self.requests += 1
        self.in_flight -= 1
        request.next, self.free_requests = self.free_requests, request

    # -- polls and timeouts -----------------------------------------------------------------------

    cdef void _watch(self, int fd, uint64_t what) noexcept nogil:
        """Hear whenever ``fd`` is written to; nobody has to read it for that."""
        cdef io_uring_sqe *sqe
        if self.once:
            eventfd_consume(fd)
        sqe = ring_next(&self.ring)
        if sqe != NULL:
            sqe.opcode, sqe.fd, sqe.poll32_events, sqe.user_data = IORING_OP_POLL_ADD, fd, POLLIN, what
            sqe.len = 0 if self.once else IORING_POLL_ADD_MULTI

    cdef void _patience(self, uint64_t what) noexcept nogil:
        cdef io_uring_sqe *sqe = ring_next(&self.ring)
        if sqe != NULL:
            sqe.opcode, sqe.fd, sqe.addr, sqe.len, sqe.user_data = IORING_OP_TIMEOUT, -1, <uintptr_t>&patience, 1, what


cdef void _work(Job *job) noexcept nogil:
    """On a worker's thread: all that its piece needs."""
    cdef Request *request = <Request *>job
    cdef Segment *segment
    cdef uint32_t index
    cdef uint64_t offset, length
    cdef int rc = 0
    if request.kind == IN:
        rc = (<BlkQueue>request.owner).image.read(request.piece, request.pieces, request.offset)
    elif request.kind == OUT:
        rc = (<BlkQueue>request.owner).image.write(request.piece, request.pieces, request.offset)
    elif request.kind == FLUSH:
        rc = (<BlkQueue>request.owner).image.flush()
    else:
        for index in range(request.segments):
            segment = &request.ranges[index]
            offset, length = segment.sector * SECTOR, <uint64_t>segment.sectors * SECTOR
            if length == 0 or rc < 0:
                continue
            if request.kind == DISCARD:
                rc = (<BlkQueue>request.owner).image.discard(offset, length)
            else:
                rc = (<BlkQueue>request.owner).image.write_zeroes(offset, length, segment.flags & UNMAP)
        if rc == 0 and (<BlkQueue>request.owner).writethrough:
            rc = (<BlkQueue>request.owner).image.flush()
    request.result = rc


def flush(Image image not None):
    """What was written to ``image`` is on stable storage. Raises OSError."""
    cdef int rc
    with nogil:
        rc = image.flush()
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))

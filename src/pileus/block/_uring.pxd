from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<linux/io_uring.h>" nogil:
    struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        uint16_t ioprio
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t rw_flags
        uint32_t fsync_flags
        uint32_t poll32_events
        uint32_t timeout_flags
        uint32_t cancel_flags
        uint64_t user_data
        uint16_t buf_index
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags
    int IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_POLL_ADD
    int IORING_OP_TIMEOUT, IORING_OP_ASYNC_CANCEL, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED
    int IOSQE_FIXED_FILE, IOSQE_CQE_SKIP_SUCCESS
    int IORING_FSYNC_DATASYNC, IORING_POLL_ADD_MULTI, IORING_CQE_F_MORE
    int IORING_ASYNC_CANCEL_ALL, IORING_ASYNC_CANCEL_ANY


cdef struct Ring:
    int fd
    int enter_fd                # what io_uring_enter takes: an index where the ring is registered
    uint32_t enter_flags
    uint32_t setup_flags
    uint32_t entries
    uint32_t tail               # of the submission queue, ours to move
    uint32_t pending            # entries that the kernel has not yet taken
    uint32_t sq_mask
    uint32_t cq_mask
    uint32_t *sq_tail
    uint32_t *sq_flags
    uint32_t *cq_head
    uint32_t *cq_tail
    io_uring_sqe *sqes
    io_uring_cqe *cqes
    void *rings                 # mappings
    size_t rings_size


# A ring of at least ``entries``, for the calling thread alone. 0, or -errno where the kernel has none to give.
cdef int ring_open(Ring *ring, uint32_t entries) noexcept nogil
cdef void ring_close(Ring *ring) noexcept nogil
# Makes ``fd`` the fixed file 0. 0 or -errno.
cdef int ring_fix_file(Ring *ring, int fd) noexcept nogil
# The next entry, all zero, or NULL while the queue is full: it goes with the next ``ring_enter``.
cdef io_uring_sqe *ring_next(Ring *ring) noexcept nogil
# Hand over what is pending and wait for ``least`` completions. 0 or -errno.
cdef int ring_enter(Ring *ring, uint32_t least) noexcept nogil
# Whether the kernel holds back completions until the next ``ring_enter``.
cdef bint ring_held_back(Ring *ring) noexcept nogil
# The oldest completion, to be looked at until ``ring_seen``; or NULL.
cdef io_uring_cqe *ring_peek(Ring *ring) noexcept nogil
cdef void ring_seen(Ring *ring) noexcept nogil

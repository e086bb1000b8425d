"""io_uring: a submission and a completion queue shared with the kernel, for one thread.

The kernel's own interface: with the two queues mapped there is so little left that a library would do for
us. Nothing to link, so nothing that might be missing where pileus runs.

Source: io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2)
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, ENOSYS, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close


cdef extern from *:
    """
    #define pileus_load_u32(place) __atomic_load_n((place), __ATOMIC_RELAXED)
    #define pileus_acquire_u32(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
    #define pileus_release_u32(place, value) __atomic_store_n((place), (value), __ATOMIC_RELEASE)
    """
    uint32_t load_u32 "pileus_load_u32"(const uint32_t *place) nogil
    uint32_t load_acquire_u32 "pileus_acquire_u32"(const uint32_t *place) nogil
    void store_release_u32 "pileus_release_u32"(uint32_t *place, uint32_t value) nogil


cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)


cdef extern from "<sys/syscall.h>":
    long SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_POPULATE
    void *MAP_FAILED


cdef extern from "<linux/io_uring.h>" nogil:
    struct io_sqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t flags
        uint32_t array
    struct io_cqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t cqes
    struct io_uring_params:
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t flags
        uint32_t features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off
    struct io_uring_rsrc_update:
        uint32_t offset
        uint64_t data
    uint32_t IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_TASKRUN_FLAG
    uint32_t IORING_SETUP_COOP_TASKRUN, IORING_SETUP_SUBMIT_ALL, IORING_SETUP_CLAMP
    uint32_t IORING_FEAT_SINGLE_MMAP, IORING_FEAT_NODROP, IORING_FEAT_SUBMIT_STABLE
    uint32_t IORING_ENTER_GETEVENTS, IORING_ENTER_REGISTERED_RING
    uint32_t IORING_SQ_TASKRUN, IORING_SQ_CQ_OVERFLOW
    uint32_t IORING_REGISTER_FILES, IORING_UNREGISTER_FILES, IORING_REGISTER_RING_FDS
    long IORING_OFF_SQ_RING, IORING_OFF_SQES


cdef int _setup(Ring *ring, io_uring_params *params, uint32_t entries) noexcept nogil:
    """With the best flags that this kernel knows: completions run only where we enter (6.1), or at least
    interrupt nobody (5.19)."""
    cdef uint32_t[3] flags
    cdef int index
    flags[0] = (IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_TASKRUN_FLAG
                | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
    flags[1] = (IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_TASKRUN_FLAG
                | IORING_SETUP_COOP_TASKRUN)
    flags[2] = IORING_SETUP_CLAMP
    for index in range(3):
        memset(params, 0, sizeof(io_uring_params))
        params.flags = flags[index]
        ring.fd = <int>syscall(SYS_io_uring_setup, entries, params)
        if ring.fd >= 0:
            ring.setup_flags = flags[index]
            return 0
        if errno != EINVAL:
            break
    return -errno


cdef int ring_open(Ring *ring, uint32_t entries) noexcept nogil:
    cdef io_uring_params params
    cdef io_uring_rsrc_update itself
    cdef uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE
    cdef uint32_t index
    cdef uint32_t *array
    cdef char *base
    cdef int rc
    memset(ring, 0, sizeof(Ring))
    rc = _setup(ring, &params, entries)
    if rc < 0:
        ring.fd = -1
        return rc
    if params.features & needed != needed:
        ring_close(ring)
        return -ENOSYS
    ring.entries = params.sq_entries
    ring.rings_size = max(
        params.sq_off.array + params.sq_entries * sizeof(uint32_t),
        params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe),
    )
    ring.rings = mmap(
        NULL, ring.rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING
    )
    ring.sqes = <io_uring_sqe *>mmap(
        NULL, ring.entries * sizeof(io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd,
        IORING_OFF_SQES
    )
    if ring.rings == MAP_FAILED or <void *>ring.sqes == MAP_FAILED:
        rc = -errno
        ring_close(ring)
        return rc
    base = <char *>ring.rings
    ring.sq_tail = <uint32_t *>(base + params.sq_off.tail)
    ring.sq_flags = <uint32_t *>(base + params.sq_off.flags)
    ring.sq_mask = (<uint32_t *>(base + params.sq_off.ring_mask))[0]
    ring.cq_head = <uint32_t *>(base + params.cq_off.head)
    ring.cq_tail = <uint32_t *>(base + params.cq_off.tail)
    ring.cq_mask = (<uint32_t *>(base + params.cq_off.ring_mask))[0]
    ring.cqes = <io_uring_cqe *>(base + params.cq_off.cqes)
    array = <uint32_t *>(base + params.sq_off.array)
    for index in range(ring.entries):
        array[index] = index
    ring.enter_fd, ring.enter_flags = ring.fd, 0
    itself.offset, itself.data = <uint32_t>-1, ring.fd
    if syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_RING_FDS, &itself, 1) == 1:
        ring.enter_fd, ring.enter_flags = itself.offset, IORING_ENTER_REGISTERED_RING
    return 0


cdef void ring_close(Ring *ring) noexcept nogil:
    if ring.rings != NULL and ring.rings != MAP_FAILED:
        munmap(ring.rings, ring.rings_size)
    if ring.sqes != NULL and <void *>ring.sqes != MAP_FAILED:
        munmap(ring.sqes, ring.entries * sizeof(io_uring_sqe))
    ring.rings, ring.sqes = NULL, NULL
    if ring.fd >= 0:
        # The kernel takes a closed ring apart later; a file's locks would stay until then.
        syscall(SYS_io_uring_register, ring.fd, IORING_UNREGISTER_FILES, NULL, 0)
        close(ring.fd)
        ring.fd = -1


cdef int ring_fix_file(Ring *ring, int fd) noexcept nogil:
    return 0 if syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_FILES, &fd, 1) >= 0 else -errno


cdef io_uring_sqe *ring_next(Ring *ring) noexcept nogil:
    cdef io_uring_sqe *sqe
    if ring.pending == ring.entries and (ring_enter(ring, 0) < 0 or ring.pending == ring.entries):
        return NULL
    sqe = &ring.sqes[ring.tail & ring.sq_mask]
    memset(sqe, 0, sizeof(io_uring_sqe))
    ring.tail += 1
    ring.pending += 1
    return sqe


cdef int ring_enter(Ring *ring, uint32_t least) noexcept nogil:
    cdef long taken
    # Release: the entries are there before the tail that covers them.
    store_release_u32(ring.sq_tail, ring.tail)
    taken = syscall(
        SYS_io_uring_enter, ring.enter_fd, ring.pending, least, IORING_ENTER_GETEVENTS | ring.enter_flags, NULL, 0
    )
    if taken < 0:
        # Interrupted, or short of memory until something completes: what is pending goes with the next call.
        return 0 if errno in (EINTR, EAGAIN, EBUSY) else -errno
    ring.pending -= <uint32_t>taken
    return 0


cdef bint ring_held_back(Ring *ring) noexcept nogil:
    return load_u32(ring.sq_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW) != 0


cdef io_uring_cqe *ring_peek(Ring *ring) noexcept nogil:
    cdef uint32_t head = load_u32(ring.cq_head)
    # Acquire: the entry is read after the tail that covers it.
    if head == load_acquire_u32(ring.cq_tail):
        return NULL
    return &ring.cqes[head & ring.cq_mask]


cdef void ring_seen(Ring *ring) noexcept nogil:
    # Release: the entry was read before the kernel may overwrite it.
    store_release_u32(ring.cq_head, load_u32(ring.cq_head) + 1)

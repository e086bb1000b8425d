from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pileus._posix cimport iovec
from pileus.virtio.queue._engine cimport Engine
from pileus.virtio.queue._queue cimport Buffers, Queue


cdef enum:
    MAX_VECTORS = 1023      # of one readv, which takes 1024: the last one is the spill
    MAX_CHAINS = MAX_VECTORS


cdef struct Header:         # virtio 1.2, 5.1.6 (struct virtio_net_hdr)
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset
    uint16_t num_buffers


cdef struct Taken:          # a chain that waits for a packet
    uint32_t length
    uint16_t vectors
    uint16_t head


cdef struct Stock:
    # Chains taken from the receive queue and not used yet, in order; their vectors lie one behind the other,
    # so that one readv spreads a packet over as many of them as it fills.
    iovec vectors[2 * MAX_VECTORS + 1]      # those in use are [first_vector, end_vector)
    uint64_t gpas[2 * MAX_VECTORS + 1]
    Taken chains[2 * MAX_CHAINS]            # likewise
    uint32_t first_vector, end_vector
    uint32_t first_chain, end_chain
    uint32_t length                         # bytes


cdef class Pair(Engine):
    cdef public uint32_t hold_ms    # how long a packet waits for chains before it is dropped
    cdef readonly uint64_t rx_packets, rx_bytes, rx_dropped
    cdef readonly uint64_t tx_packets, tx_bytes, tx_dropped
    cdef Queue rx
    cdef Queue tx
    cdef int tap
    cdef int forward_from, forward_to
    cdef bint mergeable, guest_csum, csum
    cdef uint32_t gso_types         # a bit per gso_type that the driver may send, without its ECN bit
    cdef bint gso_ecn
    cdef int problem
    # Of serve alone.
    cdef int epoll
    cdef bint readable, writable    # as far as is known: the TAP said EAGAIN since, or did not
    cdef bint rx_more, tx_more      # the queue may hold chains that nobody will kick for
    cdef bint large                 # whether packets of late needed more than one chain
    cdef uint32_t small_in_a_row
    cdef uint32_t held              # bytes of a packet that waits for chains: a part in the stock, the rest spilt
    cdef uint32_t held_window       # of them, how many are in the stock
    cdef int64_t held_until         # ns
    cdef Stock *stock
    cdef uint64_t stocked_at        # behind an IOMMU: the generation that its chains were found at
    cdef uint8_t *spill
    cdef iovec *out                 # of one writev
    cdef Buffers chain

    cdef int _prepare(self) noexcept nogil
    cdef int _watch(self, int fd, uint32_t events, int tag) noexcept nogil
    cdef int _wait(self) noexcept nogil
    cdef int _loop(self) noexcept nogil
    cdef void _tidy(self) noexcept nogil
    cdef int _receive(self) noexcept nogil
    cdef void _give_back(self) noexcept nogil
    cdef uint32_t _guess(self) noexcept nogil
    cdef int _refill(self, uint32_t wanted) noexcept nogil
    cdef ssize_t _read(self, uint32_t *window) noexcept nogil
    cdef int _deliver(self, uint32_t length, uint32_t window) noexcept nogil
    cdef void _hand_over(self, uint32_t length) noexcept nogil
    cdef void _unspill(self, uint32_t length, uint32_t window) noexcept nogil
    cdef void _put_num_buffers(self, uint16_t count) noexcept nogil
    cdef void _poke(self, uint32_t offset, uint8_t value) noexcept nogil
    cdef int _transmit(self) noexcept nogil
    cdef int _send(self) noexcept nogil
    cdef bint _acceptable(self, Header *header, uint64_t length) noexcept nogil

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from pileus._posix cimport iovec
from pileus.virtio.devices._vsock_packet cimport Header
from pileus.virtio.devices._vsock_table cimport Connection, Table
from pileus.virtio.queue._engine cimport Engine
from pileus.virtio.queue._queue cimport Buffers, Queue


cdef enum:
    MAX_GATHER = 64         # chains that one read fills
    MAX_RESETS = 4096       # a power of two
    PATH_SIZE = 108         # of sockaddr_un, its NUL included


cdef struct Reset:          # a RST to send for what is no connection, or no more
    uint32_t host_port
    uint32_t guest_port
    uint16_t type


cdef class Muxer(Engine):
    cdef readonly uint64_t rx_bytes, tx_bytes   # to the guest, from it
    cdef readonly uint64_t dropped              # packets without a proper header
    cdef readonly uint64_t refused              # connections beyond the limit
    cdef Queue rx
    cdef Queue tx
    cdef int listener
    cdef uint64_t cid
    cdef char path[PATH_SIZE]
    cdef int problem
    cdef int epoll
    cdef int64_t stopped_at         # ns
    cdef bint accepting             # the listener may have clients
    cdef bint rx_more, tx_more      # the queue may hold chains that nobody will kick for
    cdef Table *table
    cdef Reset *resets
    cdef uint32_t first_reset, end_reset
    cdef iovec *vectors             # of one read or write
    cdef Buffers stock[MAX_GATHER]  # chains to receive into
    cdef uint32_t rooms[MAX_GATHER] # bytes of payload that each is to get
    cdef Buffers chain              # a packet of the guest

    cdef int _prepare(self) noexcept nogil
    cdef int _watch(self, int fd, uint32_t events, uint64_t tag) noexcept nogil
    cdef int _loop(self) noexcept nogil
    cdef bint _has_news(self) noexcept nogil
    cdef int _begin_watch(self, Connection *one) noexcept nogil
    cdef int _wait(self) noexcept nogil
    cdef void _expire(self) noexcept nogil
    cdef void _forget_all(self) noexcept nogil
    # The host's side.
    cdef void _accept(self) noexcept nogil
    cdef void _event(self, Connection *one, uint32_t events) noexcept nogil
    cdef void _read_line(self, Connection *one) noexcept nogil
    cdef void _connect(self, Connection *one) noexcept nogil
    cdef void _flush(self, Connection *one) noexcept nogil
    cdef void _forwarded(self, Connection *one, uint32_t length) noexcept nogil
    cdef void _deaf(self, Connection *one) noexcept nogil
    cdef void _shut(self, Connection *one, int flags) noexcept nogil
    cdef void _ready(self, Connection *one) noexcept nogil
    cdef void _kill(self, Connection *one) noexcept nogil
    cdef void _remove(self, Connection *one) noexcept nogil
    cdef void _part(self, Connection *one) noexcept nogil
    # To the guest.
    cdef int _receive(self) noexcept nogil
    cdef int _take(self, Buffers *chain) noexcept nogil
    cdef void _reset_packet(self, Buffers *chain) noexcept nogil
    cdef void _control_packet(self, Connection *one, Buffers *chain) noexcept nogil
    cdef int _data_packets(self, Connection *one) noexcept nogil
    cdef void _put_packet(self, Connection *one, Buffers *chain, int op, uint32_t flags, uint32_t length) noexcept nogil
    # From the guest.
    cdef int _transmit(self) noexcept nogil
    cdef void _packet(self) noexcept nogil
    cdef void _asked(self, const Header *header) noexcept nogil
    cdef void _answered(self, Connection *one) noexcept nogil
    cdef void _shut_by_guest(self, Connection *one, uint32_t flags) noexcept nogil
    cdef void _data(self, Connection *one, uint32_t length) noexcept nogil
    cdef void _reset(self, uint32_t host_port, uint32_t guest_port, uint16_t type) noexcept nogil

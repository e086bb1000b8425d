"""A guest with one vsock connection, compiled: fast enough that a measurement shows the device.

It behaves as Linux's driver does: receive buffers of 4 KiB, packets of up to 64 KiB, 256 KiB of credit, told
again before 64 KiB are left. Nothing that the device does is checked here; the tests' guest does that.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

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
from pileus.virtio.devices._vsock_packet cimport (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER_SIZE,
    HOST_CID,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    STREAM,
    Header,
)
from pileus.virtio.queue._queue cimport Descriptor, UsedElement


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLIN


cdef enum:
    SIZE = 256              # of either ring
    SLOTS = 64              # packets to the device: a header and a payload each
    PACKET = 64 << 10
    CREDIT = 256 << 10
    TELL_BELOW = 64 << 10
    F_NEXT = 1
    F_WRITE = 2
    RING_BYTES = 16384
    PATIENCE_MS = 20000


cdef class SplitRing:
    """Where a ring is, for whoever tells the device; and the driver's half of it."""

    cdef readonly uint32_t size
    cdef readonly uint64_t descriptors, available, used_ring
    cdef Descriptor *table
    cdef uint16_t *avail
    cdef uint16_t *used
    cdef uint16_t next_avail, next_used, kicked
    cdef int kick, call

    def __cinit__(self, GuestMemory memory not None, uint64_t gpa):
        self.size = SIZE
        self.descriptors, self.available, self.used_ring = gpa, gpa + 8192, gpa + 12288
        self.table = <Descriptor *>memory.at(gpa, RING_BYTES)
        if self.table == NULL:
            raise ValueError("too little memory")
        self.avail = <uint16_t *>(<uint8_t *>self.table + 8192)
        self.used = <uint16_t *>(<uint8_t *>self.table + 12288)
        memset(self.table, 0, RING_BYTES)

    cdef void offer(self, uint16_t head) noexcept nogil:
        self.avail[2 + (self.next_avail & (SIZE - 1))] = head
        self.next_avail += 1

    cdef void publish(self) noexcept nogil:
        """Show what was offered, and kick if the device asked for that."""
        cdef uint16_t event
        store_release_u16(&self.avail[1], self.next_avail)
        full_fence()
        event = load_u16(&self.used[2 + 4 * SIZE])
        if <uint16_t>(self.next_avail - event - 1) < <uint16_t>(self.next_avail - self.kicked):
            eventfd_signal(self.kick)
        self.kicked = self.next_avail

    cdef bint has_used(self) noexcept nogil:
        return load_acquire_u16(&self.used[1]) != self.next_used

    cdef bint wait(self) noexcept nogil:
        """Sleep until a chain has come back; false where none does."""
        cdef pollfd waiting
        while not self.has_used():
            store_u16(&self.avail[2 + SIZE], self.next_used)
            full_fence()
            if self.has_used():
                break
            waiting.fd, waiting.events = self.call, POLLIN
            if poll(&waiting, 1, PATIENCE_MS) <= 0:
                return False
            eventfd_consume(self.call)
        return True


cdef class SocketGuest:
    """The guest with CID ``cid`` in ``memory``, of which it takes 8 MiB from 0 on."""

    cdef readonly SplitRing rx
    cdef readonly SplitRing tx
    cdef readonly uint64_t received
    cdef readonly bint closed
    cdef GuestMemory memory
    cdef uint64_t cid
    cdef uint32_t rx_size
    cdef uint8_t *buffers
    cdef uint8_t *headers
    cdef bint connected
    cdef uint32_t host_port, port
    cdef uint32_t sent, peer_alloc, peer_taken, told

    def __init__(self, GuestMemory memory not None, uint64_t cid, uint32_t rx_size=4096):
        cdef uint64_t buffers = 1 << 20, headers = 2 * RING_BYTES, payloads = 4 << 20
        cdef int index
        self.memory, self.cid, self.rx_size = memory, cid, rx_size
        self.rx, self.tx = SplitRing(memory, 0), SplitRing(memory, RING_BYTES)
        self.buffers = memory.at(buffers, SIZE * rx_size)
        self.headers = memory.at(headers, SLOTS * 64)
        if memory.at(payloads, PACKET) == NULL or self.buffers == NULL or rx_size > 8192:
            raise ValueError("too little memory")
        for index in range(SIZE):
            self.rx.table[index].gpa = buffers + index * rx_size
            self.rx.table[index].length, self.rx.table[index].flags = rx_size, F_WRITE
        for index in range(SLOTS):
            self.tx.table[2 * index].gpa, self.tx.table[2 * index].length = headers + index * 64, HEADER_SIZE
            self.tx.table[2 * index].next = 2 * index + 1
            self.tx.table[2 * index + 1].gpa = payloads + <uint64_t>(index % 16) * PACKET

    def start(self, int rx_kick, int rx_call, int tx_kick, int tx_call):
        """Begin, once the device knows the rings."""
        cdef int index
        self.rx.kick, self.rx.call, self.tx.kick, self.tx.call = rx_kick, rx_call, tx_kick, tx_call
        for index in range(SIZE):
            self.rx.offer(<uint16_t>index)
        self.rx.publish()

    def accept(self):
        """Take the connection that comes."""
        with nogil:
            while not self.connected and self._step():
                pass
        self._check(self.connected)

    def send(self, uint64_t total, uint32_t packet=PACKET):
        """Send ``total`` bytes in packets of up to ``packet``, as far as there is credit."""
        cdef bint good
        with nogil:
            good = self._send(total, min(packet, <uint32_t>PACKET))
        self._check(good)

    def receive(self, uint64_t total):
        """Take bytes in until ``total`` have come since the connection began."""
        with nogil:
            while self.received < total and self._step():
                pass
        self._check(self.received >= total)

    def echo(self, uint64_t count, uint32_t size):
        """Answer ``count`` messages of ``size`` bytes by as many."""
        cdef uint64_t until = self.received
        cdef bint good = True
        with nogil:
            while count and good:
                until += size
                while self.received < until and good:
                    good = self._step()
                good = good and self._send(size, size)
                count -= 1
        self._check(good)

    def _check(self, good):
        if not good:
            raise RuntimeError("the connection is closed" if self.closed else "the device does nothing more")

    cdef bint _send(self, uint64_t total, uint32_t packet) noexcept nogil:
        cdef uint32_t room, here
        while total:
            while self.rx.has_used():
                self._take()
            room = self.peer_alloc - (self.sent - self.peer_taken)
            if room == 0:
                if not self._step():
                    return False
                continue
            here = min(min(packet, room), <uint32_t>min(total, <uint64_t>PACKET))
            if not self._say(RW, here):
                return False
            self.sent += here
            total -= here
        return True

    cdef bint _say(self, uint16_t op, uint32_t length) noexcept nogil:
        cdef uint32_t slot
        cdef Header *header
        while <uint16_t>(self.tx.next_avail - self.tx.next_used) >= SLOTS:
            if not self.tx.wait():
                return False
            self.tx.next_used = load_acquire_u16(&self.tx.used[1])  # it gives them back in order
        slot = self.tx.next_avail & (SLOTS - 1)
        header = <Header *>(self.headers + slot * 64)
        header.src_cid, header.dst_cid, header.src_port, header.dst_port = self.cid, HOST_CID, self.port, self.host_port
        header.length, header.type, header.op, header.flags = length, STREAM, op, 0
        header.buf_alloc, header.fwd_cnt = CREDIT, <uint32_t>self.received
        self.told = <uint32_t>self.received
        self.tx.table[2 * slot].flags = F_NEXT if length else 0
        self.tx.table[2 * slot + 1].length = length
        self.tx.offer(<uint16_t>(2 * slot))
        self.tx.publish()
        return True

    cdef bint _step(self) noexcept nogil:
        """Obey what came, or wait for something."""
        if self.closed or not self.rx.wait():
            return False
        while self.rx.has_used():
            self._take()
        return True

    cdef void _take(self) noexcept nogil:
        """Obey a packet, and give its buffer back."""
        cdef UsedElement *ring = <UsedElement *>&self.rx.used[2]
        cdef uint32_t head = ring[self.rx.next_used & (SIZE - 1)].head & (SIZE - 1)
        cdef Header *header = <Header *>(self.buffers + head * self.rx_size)
        self.rx.next_used += 1
        self.peer_alloc, self.peer_taken = header.buf_alloc, header.fwd_cnt
        if header.op == RW:
            self.received += header.length
            if CREDIT - (<uint32_t>self.received - self.told) < TELL_BELOW:
                self._say(CREDIT_UPDATE, 0)
        elif header.op == REQUEST:
            self.host_port, self.port = header.src_port, header.dst_port
            self.received = self.sent = 0
            self.connected = True
            self._say(RESPONSE, 0)
        elif header.op == CREDIT_REQUEST:
            self._say(CREDIT_UPDATE, 0)
        elif header.op == RST or header.op == SHUTDOWN:
            self.closed = True
        self.rx.offer(<uint16_t>head)
        # As Linux does, refill in batches: a kick for each would cost more than the packet.
        if <uint16_t>(self.rx.next_avail - self.rx.kicked) >= SIZE // 2 or not self.rx.has_used():
            self.rx.publish()

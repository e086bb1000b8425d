"""Packets between a pair of virtqueues and a TAP, by one thread without the GIL.

A frame is read straight into the driver's buffers and written straight out of them. Its header is the same on
both sides: 12 bytes of struct virtio_net_hdr, which the host's kernel reads from a copy that was checked.

*Receive.* How long a frame is shows only once it is read. So chains are taken ahead of it (``Stock``) and the
readv gets, behind them, a *spill* of our own: a frame that is longer than was guessed is completed by copying.
While packets are small the guess is one chain; after a large one it is as many as the largest packet takes.
A packet that the driver has too few chains for is *held* for a while, which keeps the rest in the TAP. With no
chain at all the TAP is not read until the driver kicks.

*Waiting.* All descriptors but stop_fd are edge-triggered: what was readable stays so until it says EAGAIN, and
no eventfd has to be read. Either direction does a bounded batch, then it is the other's turn.

Source: virtio 1.2, 5.1.6 (Device Operation of the network device)
"""

from libc.errno cimport EAGAIN, EINTR, ENOMEM, EPROTO, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove
from posix.unistd cimport close

from pileus._posix cimport eventfd_signal, iovec
from pileus.virtio.queue._engine cimport Engine
from pileus.virtio.queue._queue cimport MAX_BUFFERS, Buffers, Queue, buffers_free, buffers_init


cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *vectors, int count)
    ssize_t writev(int fd, const iovec *vectors, int count)


cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int count, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD
    uint32_t EPOLLIN, EPOLLOUT, EPOLLET


cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int clock_gettime(int clock, timespec *time)
    int CLOCK_MONOTONIC


cdef enum:
    HEADER_SIZE = 12
    NUM_BUFFERS = 10            # where it is in the header

    F_NEEDS_CSUM = 1
    GSO_NONE = 0
    GSO_ECN = 0x80
    GSO_UDP = 3

    LARGEST = 65536 + 64        # bytes: a large packet, its headers, ours
    SPILL_SIZE = 1 << 17
    SMALL_AGAIN = 64            # packets that fit into one chain, until that is the guess again
    RX_BATCH = 64               # packets
    TX_BATCH = 64
    BATCH_BYTES = 1 << 19
    HOLD_MS = 50
    FULL = 1

    TAG_TAP = 0
    TAG_RX = 1
    TAG_TX = 2
    TAG_STOP = 3
    TAG_FORWARD = 4

cdef enum Problem:
    NONE
    SHORT_BUFFER
    READABLE_BUFFER

PROBLEMS = {
    SHORT_BUFFER: "a receive buffer has no room for the header (5.1.6.3.1)",
    READABLE_BUFFER: "a receive buffer is not for the device to write",
}


cdef class Pair(Engine):
    """Engine of one pair of queues. Borrows ``tap``, a non-blocking descriptor with 12-byte headers.

    ``configure`` before ``start``. ``fault`` says in words what the driver did wrong.
    """

    def __init__(self, str name, failed, Queue rx not None, Queue tx not None, int tap):
        Engine.__init__(self, name, failed)
        self.rx, self.tx, self.tap = rx, tx, tap
        self.forward_from = self.forward_to = self.epoll = -1
        self.hold_ms = HOLD_MS
        buffers_init(&self.chain)

    def __dealloc__(self):
        buffers_free(&self.chain)

    def configure(self, bint mergeable, bint guest_csum, bint csum, uint32_t gso_types, bint gso_ecn):
        """What was negotiated; ``gso_types`` has a bit for each gso_type that the driver may send."""
        self.mergeable, self.guest_csum = mergeable, guest_csum
        self.csum, self.gso_types, self.gso_ecn = csum, gso_types, gso_ecn

    def forward(self, int source, int target):
        """Signal the eventfd ``target`` whenever ``source`` is signalled; -1, -1 for nothing."""
        self.forward_from, self.forward_to = source, target

    @property
    def fault(self):
        if self.problem:
            return PROBLEMS[self.problem]
        return self.rx.broken or self.tx.broken

    # -- the thread -------------------------------------------------------------------------------

    cdef int serve(self) noexcept nogil:
        cdef int result = self._prepare()
        if result == 0:
            result = self._loop()
        self._tidy()
        return result

    cdef int _prepare(self) noexcept nogil:
        self.problem = NONE
        self.readable = self.writable = True
        self.rx_more, self.tx_more = self.rx.active, self.tx.active
        self.large = False
        self.small_in_a_row = self.held = 0
        self.stock = <Stock *>calloc(1, sizeof(Stock))
        self.spill = <uint8_t *>malloc(SPILL_SIZE)
        self.out = <iovec *>malloc((MAX_BUFFERS + 1) * sizeof(iovec))
        if self.stock == NULL or self.spill == NULL or self.out == NULL:
            return -ENOMEM
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            return -errno
        if self._watch(self.stop_fd, EPOLLIN, TAG_STOP) < 0:
            return -errno
        if self._watch(self.tap, EPOLLIN | EPOLLOUT | EPOLLET, TAG_TAP) < 0:
            return -errno
        if self.rx.active and self._watch(self.rx.kick_fd, EPOLLIN | EPOLLET, TAG_RX) < 0:
            return -errno
        if self.tx.active and self._watch(self.tx.kick_fd, EPOLLIN | EPOLLET, TAG_TX) < 0:
            return -errno
        if self.forward_from >= 0 and self._watch(self.forward_from, EPOLLIN | EPOLLET, TAG_FORWARD) < 0:
            return -errno
        return 0

    cdef int _watch(self, int fd, uint32_t events, int tag) noexcept nogil:
        cdef epoll_event event
        event.events = events
        event.data.u64 = tag
        return epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, &event)

    cdef void _tidy(self) noexcept nogil:
        """Chains that no packet came for go back: none is in flight when the thread has ended."""
        if self.held:
            self.rx_dropped += 1
        if self.stock != NULL:
            self._give_back()
        if self.epoll >= 0:
            close(self.epoll)
        self.epoll = -1
        free(self.stock)
        free(self.spill)
        free(self.out)
        self.stock, self.spill, self.out = NULL, NULL, NULL

    cdef int _loop(self) noexcept nogil:
        cdef int result
        while True:
            result = self._wait()
            if result != 0:
                return 0 if result > 0 else result
            if self.rx_more and (self.readable or self.held):
                result = self._receive()
                if result < 0:
                    return result
            if self.tx_more and self.writable:
                result = self._transmit()
                if result < 0:
                    return result

    cdef int _wait(self) noexcept nogil:
        """Sleep until there is something to do, if there is nothing; 1: the thread is to end."""
        cdef epoll_event events[5]
        cdef int index, count, timeout = -1
        cdef uint64_t tag
        if (self.rx_more and (self.readable or self.held)) or (self.tx_more and self.writable):
            timeout = 0
        elif self.held:
            timeout = self.hold_ms
        count = epoll_wait(self.epoll, events, 5, timeout)
        if count < 0:
            return 0 if errno == EINTR else -errno
        for index in range(count):
            tag = events[index].data.u64
            if tag == TAG_TAP:
                # Errors and hang-ups too: the next read or write tells what it is.
                self.readable = self.readable or events[index].events & ~EPOLLOUT != 0
                self.writable = self.writable or events[index].events & ~EPOLLIN != 0
            elif tag == TAG_RX:
                self.rx_more = True
            elif tag == TAG_TX:
                self.tx_more = True
            elif tag == TAG_FORWARD:
                eventfd_signal(self.forward_to)
            else:
                return 1
        if self.held and _now() >= self.held_until:
            self.held = 0
            self.rx_dropped += 1
            self.rx_more = True
        return 0

    # -- receive ----------------------------------------------------------------------------------

    cdef void _give_back(self) noexcept nogil:
        """Empty the stock."""
        while self.stock.end_chain > self.stock.first_chain:
            self.stock.end_chain -= 1
            self.rx.untake(self.stock.chains[self.stock.end_chain].head)
        self.stock.first_chain = self.stock.end_chain = self.stock.first_vector = self.stock.end_vector = 0
        self.stock.length = 0
        self.rx.flush()

    cdef int _receive(self) noexcept nogil:
        """Packets from the TAP to the driver, until one of them has no more, or a batch."""
        cdef int packets = 0, ready = 0
        cdef uint64_t enough = self.rx_bytes + BATCH_BYTES
        cdef uint32_t window
        cdef ssize_t length
        self.rx.disable_kicks()
        while packets < RX_BATCH and self.rx_bytes < enough:
            packets += 1  # each turn costs something, also with a driver that only plays with its index
            if self.rx.pages != NULL and self.rx.iommu.generation != self.stocked_at:
                # Something was unmapped since: perhaps what a packet would go to.
                self.rx_dropped += self.held != 0
                self.held = 0
                self._give_back()
                self.stocked_at = self.rx.iommu.generation
            ready = self._deliver(self.held, self.held_window) if self.held else self._refill(self._guess())
            if ready < 0:
                break
            if self.held or self.stock.first_chain == self.stock.end_chain:
                # Show what is done first: the driver may be waiting for just that.
                self.rx.flush()
                if self.rx.enable_kicks():
                    self.rx.disable_kicks()
                    continue
                self.rx_more = False
                break
            length = self._read(&window)
            if length < 0:
                if errno == EINTR:
                    continue
                self.readable = False  # EAGAIN; or the interface is down, and its coming up will wake us
                break
            if length >= HEADER_SIZE:
                ready = self._deliver(<uint32_t>length, window)
                if ready < 0:
                    break
        self.rx.flush()
        return ready if ready < 0 else 0

    cdef uint32_t _guess(self) noexcept nogil:
        """Bytes that the next packet may have."""
        return LARGEST if self.large and self.mergeable else HEADER_SIZE

    cdef int _refill(self, uint32_t wanted) noexcept nogil:
        """Take chains until they hold ``wanted`` bytes; 0: the driver or, FULL, the stock has no more."""
        cdef Stock *stock = self.stock
        cdef uint32_t count, length
        cdef Taken *taken
        cdef int got
        while stock.length < wanted:
            got = self.rx.take(&self.chain)
            if got <= 0:
                return -EPROTO if got < 0 else 0
            if self.chain.readable:
                self.problem = READABLE_BUFFER
                return -EPROTO
            if self.chain.writable_length < HEADER_SIZE:
                self.problem = SHORT_BUFFER
                return -EPROTO
            if self.chain.count > MAX_VECTORS or self.chain.writable_length > LARGEST:
                _cut(&self.chain)
            count, length = self.chain.count, <uint32_t>self.chain.writable_length
            if stock.end_vector - stock.first_vector + count > MAX_VECTORS:
                self.rx.untake(self.chain.head)
                return FULL
            if stock.end_vector + count > 2 * MAX_VECTORS or stock.end_chain == 2 * MAX_CHAINS:
                _compact(stock)
            memcpy(&stock.vectors[stock.end_vector], self.chain.vectors, count * sizeof(iovec))
            memcpy(&stock.gpas[stock.end_vector], self.chain.gpas, count * sizeof(uint64_t))
            taken = &stock.chains[stock.end_chain]
            taken.head, taken.vectors, taken.length = self.chain.head, <uint16_t>count, length
            stock.end_vector += count
            stock.end_chain += 1
            stock.length += length
        return 0

    cdef ssize_t _read(self, uint32_t *window) noexcept nogil:
        """Read a packet into the stock, or into its first chain if a small one is expected, and the spill."""
        cdef Stock *stock = self.stock
        cdef Taken *chain = &stock.chains[stock.first_chain]
        cdef uint32_t vectors = chain.vectors
        cdef iovec *last
        cdef iovec kept
        cdef ssize_t length
        window[0] = chain.length
        if self.large and self.mergeable:
            vectors, window[0] = stock.end_vector - stock.first_vector, stock.length
        last = &stock.vectors[stock.first_vector + vectors]
        kept = last[0]
        last.iov_base, last.iov_len = self.spill, SPILL_SIZE
        length = readv(self.tap, &stock.vectors[stock.first_vector], vectors + 1)
        last[0] = kept
        return length

    cdef int _deliver(self, uint32_t length, uint32_t window) noexcept nogil:
        """Give the driver the packet just read, ``length`` bytes whose first ``window`` are in the stock.

        It may end as ``held``, while the driver has too few chains for it. Negative for a broken ring.
        """
        cdef int result
        if length > window:
            self.large, self.small_in_a_row = True, 0
            result = self._refill(length) if self.mergeable else FULL
            if result < 0:
                return result
            if length > self.stock.length or result == FULL:
                if result == FULL:
                    self.held = 0
                    self.rx_dropped += 1
                elif not self.held:
                    self.held, self.held_window = length, window
                    self.held_until = _now() + <int64_t>self.hold_ms * 1000000
                return 0
            self._unspill(length, window)
        elif length > self.stock.chains[self.stock.first_chain].length:
            self.small_in_a_row = 0
        elif self.large:
            self.small_in_a_row += 1
            self.large = self.small_in_a_row < SMALL_AGAIN
        self.held = 0
        self._hand_over(length)
        return 0

    cdef void _unspill(self, uint32_t length, uint32_t window) noexcept nogil:
        """Copy what was spilt to the vectors of the stock behind the first ``window`` bytes."""
        cdef iovec *vector = &self.stock.vectors[self.stock.first_vector]
        cdef uint32_t here, done = 0, left = length - window
        while window >= vector.iov_len and window > 0:
            window -= vector.iov_len
            vector += 1
        while left:
            here = <uint32_t>min(vector.iov_len - window, <size_t>left)
            memcpy(<uint8_t *>vector.iov_base + window, self.spill + done, here)
            done += here
            left -= here
            window = 0
            vector += 1

    cdef void _hand_over(self, uint32_t length) noexcept nogil:
        """Put the chains that hold the first ``length`` bytes of the stock into the used ring."""
        cdef Stock *stock = self.stock
        cdef uint32_t left = length, here, index
        cdef uint16_t count = 0
        cdef Taken *chain
        chain = &stock.chains[stock.first_chain]
        while left > chain.length:
            left -= chain.length
            count += 1
            chain += 1
        self._put_num_buffers(count + 1)
        if not self.guest_csum:
            self._poke(0, 0)  # the kernel tells of valid checksums whether asked or not (5.1.6.4.1)
        left = length
        for index in range(count + 1):
            chain = &stock.chains[stock.first_chain]
            here = min(left, chain.length)
            if self.rx.memory.tracked:
                _mark(self.rx, stock, here)
            self.rx.put(chain.head, here)
            left -= here
            stock.first_chain += 1
            stock.first_vector += chain.vectors
            stock.length -= chain.length
        if stock.first_chain == stock.end_chain:
            stock.first_chain = stock.end_chain = stock.first_vector = stock.end_vector = 0
        self.rx_packets += 1
        self.rx_bytes += length - HEADER_SIZE

    cdef void _put_num_buffers(self, uint16_t count) noexcept nogil:
        cdef iovec *vector = &self.stock.vectors[self.stock.first_vector]
        if vector.iov_len >= HEADER_SIZE:
            memcpy(<uint8_t *>vector.iov_base + NUM_BUFFERS, &count, 2)
        else:
            self._poke(NUM_BUFFERS, count & 0xFF)
            self._poke(NUM_BUFFERS + 1, count >> 8)

    cdef void _poke(self, uint32_t offset, uint8_t value) noexcept nogil:
        """Write a byte of the header of the packet at the front of the stock."""
        cdef iovec *vector = &self.stock.vectors[self.stock.first_vector]
        while offset >= vector.iov_len:  # a chain has HEADER_SIZE bytes at least
            offset -= vector.iov_len
            vector += 1
        (<uint8_t *>vector.iov_base)[offset] = value

    # -- transmit ---------------------------------------------------------------------------------

    cdef int _transmit(self) noexcept nogil:
        """Packets from the driver to the TAP, until one of them can do no more, or a batch."""
        cdef int packets = 0, got, result = 0
        cdef uint64_t enough = self.tx_bytes + BATCH_BYTES
        self.tx.disable_kicks()
        while packets < TX_BATCH and self.tx_bytes < enough:
            packets += 1
            got = self.tx.take(&self.chain)
            if got < 0:
                result = -EPROTO
                break
            if got == 0:
                self.tx.flush()
                if self.tx.enable_kicks():
                    self.tx.disable_kicks()
                    continue
                self.tx_more = False
                break
            if self._send() == -EAGAIN:
                self.tx.untake(self.chain.head)
                self.writable = False  # until the TAP says otherwise
                break
            self.tx.put(self.chain.head, 0)
        self.tx.flush()
        return result

    cdef int _send(self) noexcept nogil:
        """Write the packet in ``chain``; one that is bad, or that the host does not take, is dropped."""
        cdef Header header
        cdef uint32_t index = 0, got = 0, count, here
        cdef iovec *vector
        cdef ssize_t written
        if not HEADER_SIZE < self.chain.readable_length <= LARGEST:
            self.tx_dropped += 1
            return 0
        # The header is copied once, then checked: the driver could change it behind our back.
        while True:
            vector = &self.chain.vectors[index]
            here = <uint32_t>min(vector.iov_len, <size_t>(HEADER_SIZE - got))
            memcpy(<uint8_t *>&header + got, vector.iov_base, here)
            got += here
            if got == HEADER_SIZE:
                break
            index += 1
        if not self._acceptable(&header, self.chain.readable_length - HEADER_SIZE):
            self.tx_dropped += 1
            return 0
        self.out[0].iov_base, self.out[0].iov_len = &header, HEADER_SIZE
        count = 1
        if here < vector.iov_len:
            self.out[1].iov_base = <uint8_t *>vector.iov_base + here
            self.out[1].iov_len = vector.iov_len - here
            count = 2
        memcpy(&self.out[count], vector + 1, (self.chain.readable - index - 1) * sizeof(iovec))
        count += self.chain.readable - index - 1
        while True:
            written = writev(self.tap, self.out, count)
            if written >= 0:
                self.tx_packets += 1
                self.tx_bytes += written - HEADER_SIZE
                return 0
            if errno == EAGAIN:
                return -EAGAIN
            if errno != EINTR:  # EIO: the interface is down
                self.tx_dropped += 1
                return 0

    cdef bint _acceptable(self, Header *header, uint64_t length) noexcept nogil:
        """Judge a driver's header for a frame of ``length`` bytes. Source: virtio 1.2, 5.1.6.2.1."""
        cdef uint8_t kind = header.gso_type & ~GSO_ECN
        cdef bint needs_csum = header.flags & F_NEEDS_CSUM
        header.flags &= F_NEEDS_CSUM
        if needs_csum and not (
            self.csum and <uint32_t>header.csum_start + header.csum_offset + 2 <= length
        ):
            return False
        if kind == GSO_NONE:
            header.gso_type = GSO_NONE
            header.gso_size = 0
        elif kind > 31 or not self.gso_types & (<uint32_t>1 << kind) or header.gso_size == 0 or not needs_csum:
            return False
        elif header.gso_type & GSO_ECN and (not self.gso_ecn or kind == GSO_UDP):
            return False
        if header.hdr_len > length:
            header.hdr_len = <uint16_t>length  # a hint for the kernel, which refuses the frame for a wrong one
        return True


cdef void _cut(Buffers *chain) noexcept nogil:
    """Forget what no packet can reach: all behind LARGEST bytes or MAX_VECTORS."""
    cdef uint32_t index = 0, left = LARGEST
    while index < chain.count and index < MAX_VECTORS and left:
        if chain.vectors[index].iov_len > left:
            chain.vectors[index].iov_len = left
        left -= <uint32_t>chain.vectors[index].iov_len
        index += 1
    chain.count = index
    chain.writable_length = LARGEST - left


cdef void _compact(Stock *stock) noexcept nogil:
    """Move what is in use to the front."""
    cdef uint32_t vectors = stock.end_vector - stock.first_vector, chains = stock.end_chain - stock.first_chain
    memmove(stock.vectors, &stock.vectors[stock.first_vector], vectors * sizeof(iovec))
    memmove(stock.gpas, &stock.gpas[stock.first_vector], vectors * sizeof(uint64_t))
    memmove(stock.chains, &stock.chains[stock.first_chain], chains * sizeof(Taken))
    stock.first_vector = stock.first_chain = 0
    stock.end_vector, stock.end_chain = vectors, chains


cdef void _mark(Queue queue, Stock *stock, uint32_t length) noexcept nogil:
    """Tell dirty tracking of ``length`` bytes in the first chain of the stock."""
    cdef uint32_t index = stock.first_vector, here
    while length:
        here = <uint32_t>min(stock.vectors[index].iov_len, <size_t>length)
        queue.memory.mark(stock.gpas[index], here)
        length -= here
        index += 1


cdef int64_t _now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000000000 + time.tv_nsec

"""Stream connections between a guest's AF_VSOCK and Unix sockets of the host, by one thread without the GIL.

*Host to guest.* A client's bytes are read straight into the driver's buffers, one read for as many chains as
the connection filled of late; their headers are written in front. Nothing is read that the guest has no credit
for, so what it does not take stays in the client's socket.

*Guest to host.* A packet's payload is written straight out of the driver's buffers. What the client has no room
for is copied (``buffer_add``), so that one slow client holds up no chain of another; credit bounds the copy.

*News.* A connection with something for the guest is in the ring ``ready`` and gets one turn after the other. A
RST for what is no connection waits in ``resets``; while many wait, no packet of the guest is looked at, so it
cannot make more than it takes.

*Waiting.* All descriptors but stop_fd are edge-triggered: what was readable stays so until it says EAGAIN. Room
in a socket is only watched after it once had none. Nothing here polls, but for a listener whose backlog is full.

Source: virtio 1.2, 5.10.6 (Device Operation of the socket device); docs/vsock.md for the Unix side
"""

from libc.errno cimport EAGAIN, EINTR, ENOMEM, EPROTO, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strncasecmp
from posix.unistd cimport close

from pileus._posix cimport iovec
from pileus.virtio.devices._vsock_packet cimport (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER_SIZE,
    HOST_CID,
    NO_RECEIVE,
    NO_SEND,
    NOTHING_MORE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    STREAM,
    Header,
    cut,
    header_read,
    header_write,
)
from pileus.virtio.devices._vsock_table cimport (
    ASK_CREDIT,
    BUFFER,
    CLOSING,
    CONNECTING,
    ESTABLISHED,
    GUEST_TIMER,
    LINE,
    LINE_TIMER,
    LINGER_TIMER,
    LINGERING,
    MAX_CONNECTIONS,
    REQUESTED,
    RETRY_TIMER,
    TELL_CREDIT,
    TELL_REQUEST,
    TELL_RESPONSE,
    TELL_SHUTDOWN,
    TIMERS,
    Connection,
    Table,
    buffer_add,
    buffer_drop,
    credit,
    link_append,
    link_first,
    link_remove,
    table_add,
    table_at,
    table_find,
    table_hash,
    table_init,
    table_port,
    table_remove,
    table_unhash,
    timer_next,
    timer_set,
    timers_shift,
)
from pileus.virtio.queue._engine cimport Engine
from pileus.virtio.queue._queue cimport MAX_BUFFERS, Buffers, Queue, buffers_free, buffers_init


cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *vectors, int count)


cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        pass
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    int accept4(int fd, sockaddr *address, unsigned int *length, int flags)
    int socket_of "socket"(int domain, int type, int protocol)
    int connect(int fd, const sockaddr *address, unsigned int length)
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void *data, size_t length, int flags)
    ssize_t send(int fd, const void *data, size_t length, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int AF_UNIX, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC, MSG_NOSIGNAL, MSG_PEEK, SHUT_RD, SHUT_WR


cdef extern from "<sys/un.h>" nogil:
    struct sockaddr_un:
        unsigned short sun_family
        char sun_path[108]


cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int count, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLHUP, EPOLLERR, EPOLLET


cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int clock_gettime(int clock, timespec *time)
    int CLOCK_MONOTONIC


cdef enum:
    EVENTS = 64
    ACCEPTS = 64            # clients taken in one turn
    RX_TURNS = 64
    TX_BATCH = 64           # packets
    BATCH_BYTES = 1 << 20
    TURN_BYTES = 256 << 10  # read from one client before it is another's turn
    MAX_PAYLOAD = 64 << 10  # of one packet to the guest: what drivers expect at most
    TELL_AFTER = 128 << 10  # bytes, half of BUFFER, that a client took, until the guest is told
    ENOUGH_RESETS = 1024
    LINE_LIMIT = 32         # bytes of "CONNECT 4294967295\n" and some blanks
    RETRY_MS = 10
    NO_CHAIN = 1

    # Tags of events; a connection's has its generation in the upper half.
    TAG_STOP = 0
    TAG_LISTENER = 1
    TAG_RX = 2
    TAG_TX = 3

cdef enum:  # problem
    NONE
    SHORT_BUFFER
    READABLE_BUFFER

PROBLEMS = {
    SHORT_BUFFER: "a receive buffer has no room for a header and a byte (5.10.6)",
    READABLE_BUFFER: "a receive buffer is not for the device to write",
}
BUFFER_SIZE = BUFFER
CONNECTION_LIMIT = MAX_CONNECTIONS


cdef class Muxer(Engine):
    """Engine of the rx and tx queues. Borrows ``listener``, a non-blocking Unix socket that listens at ``path``.

    ``stop`` leaves connections as they are for the next ``start``, and their time stands still; ``disconnect``,
    while stopped, ends them.
    ``line_ms`` is how long a client may take to name its port, ``guest_ms`` how long the guest may take to
    answer, ``linger_ms`` how long a client may take nothing of what a guest left for it.
    """

    def __cinit__(self, *_, **__):
        cdef int index
        self.epoll = self.listener = -1
        buffers_init(&self.chain)
        for index in range(MAX_GATHER):
            buffers_init(&self.stock[index])

    def __init__(
        self,
        str name,
        failed,
        Queue rx not None,
        Queue tx not None,
        int listener,
        bytes path not None,
        uint64_t cid,
        uint32_t line_ms,
        uint32_t guest_ms,
        uint32_t linger_ms,
    ):
        Engine.__init__(self, name, failed)
        if len(path) >= PATH_SIZE:
            raise ValueError("the path is too long")
        memcpy(self.path, <const char *>path, len(path) + 1)
        self.rx, self.tx, self.listener, self.cid = rx, tx, listener, cid
        self.table = <Table *>malloc(sizeof(Table))
        self.resets = <Reset *>malloc(MAX_RESETS * sizeof(Reset))
        self.vectors = <iovec *>malloc((MAX_BUFFERS + 1) * sizeof(iovec))
        if self.table == NULL or self.resets == NULL or self.vectors == NULL:
            raise MemoryError
        table_init(self.table)
        self.table.durations[LINE_TIMER] = <int64_t>line_ms * 1000000
        self.table.durations[GUEST_TIMER] = <int64_t>guest_ms * 1000000
        self.table.durations[RETRY_TIMER] = <int64_t>RETRY_MS * 1000000
        self.table.durations[LINGER_TIMER] = <int64_t>linger_ms * 1000000

    def __dealloc__(self):
        cdef int index
        if self.table != NULL:
            self._forget_all()
        if self.epoll >= 0:
            close(self.epoll)
        free(self.table)
        free(self.resets)
        free(self.vectors)
        buffers_free(&self.chain)
        for index in range(MAX_GATHER):
            buffers_free(&self.stock[index])

    def disconnect(self):
        """End every connection, without a word to the guest, and give all descriptors back. Only while stopped."""
        if self.running:
            raise RuntimeError(f"{self.name}: it is running")
        self._forget_all()
        if self.epoll >= 0:
            close(self.epoll)
            self.epoll = -1

    @property
    def connections(self):
        """How many there are, those that begin and end included."""
        return MAX_CONNECTIONS - self.table.spares

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
        if result < 0:
            self._forget_all()  # nobody serves them any more, and their clients are to know
        self.stopped_at = _now()
        return result

    cdef int _prepare(self) noexcept nogil:
        self.problem = NONE
        self.rx_more, self.tx_more = self.rx.active, self.tx.active
        self.accepting = True
        if self.rx.active:
            self.rx.disable_kicks()
        if self.epoll >= 0:
            timers_shift(self.table, _now() - self.stopped_at)
            return 0
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            return -errno
        if self._watch(self.stop_fd, EPOLLIN, TAG_STOP) < 0:
            return -errno
        if self._watch(self.listener, EPOLLIN | EPOLLET, TAG_LISTENER) < 0:
            return -errno
        if self._watch(self.rx.kick_fd, EPOLLIN | EPOLLET, TAG_RX) < 0:
            return -errno
        if self._watch(self.tx.kick_fd, EPOLLIN | EPOLLET, TAG_TX) < 0:
            return -errno
        return 0

    cdef int _watch(self, int fd, uint32_t events, uint64_t tag) noexcept nogil:
        cdef epoll_event event
        event.events, event.data.u64 = events, tag
        return epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, &event)

    cdef int _loop(self) noexcept nogil:
        cdef int result
        while True:
            result = self._wait()
            if result:
                return result if result < 0 else 0
            if self.accepting:
                self._accept()
            if self.tx_more and self.end_reset - self.first_reset < ENOUGH_RESETS:
                result = self._transmit()
                if result < 0:
                    return result
            if self.rx_more:
                result = self._receive()
                if result < 0:
                    return result

    cdef bint _has_news(self) noexcept nogil:
        return self.end_reset != self.first_reset or link_first(&self.table.ready) != NULL

    cdef int _wait(self) noexcept nogil:
        """Sleep until there is something to do, if there is nothing; 1: the thread is to end."""
        cdef epoll_event events[EVENTS]
        cdef int index, count, timeout = -1
        cdef int64_t soonest = timer_next(self.table)
        cdef Connection *one
        cdef uint64_t tag
        if (
            self.accepting
            or (self.tx_more and self.end_reset - self.first_reset < ENOUGH_RESETS)
            or (self.rx_more and self._has_news())
        ):
            timeout = 0
        elif soonest >= 0:
            soonest -= _now()
            timeout = 0 if soonest <= 0 else <int>((soonest + 999999) // 1000000)
        count = epoll_wait(self.epoll, events, EVENTS, timeout)
        if count < 0:
            return 0 if errno == EINTR else -errno
        for index in range(count):
            tag = events[index].data.u64
            if tag == TAG_STOP:
                return 1
            if tag == TAG_RX:
                self.rx_more = self.rx.active
            elif tag == TAG_TX:
                self.tx_more = self.tx.active
            elif tag == TAG_LISTENER:
                self.accepting = True
            else:
                one = table_at(self.table, <uint32_t>tag, <uint32_t>(tag >> 32))
                if one != NULL:
                    self._event(one, events[index].events)
        if soonest >= 0 or timer_next(self.table) >= 0:
            self._expire()
        return 0

    cdef void _expire(self) noexcept nogil:
        cdef int64_t now = _now()
        cdef Connection *one
        cdef int kind
        for kind in range(TIMERS):
            while True:
                one = link_first(&self.table.timers[kind])
                if one == NULL or one.deadline > now:
                    break
                if kind == RETRY_TIMER and now - one.since < self.table.durations[GUEST_TIMER]:
                    self._connect(one)
                else:
                    self._kill(one)

    cdef void _forget_all(self) noexcept nogil:
        cdef int index
        for index in range(MAX_CONNECTIONS):
            if self.table.slots[index] != NULL:
                table_remove(self.table, self.table.slots[index])
        self.first_reset = self.end_reset = 0

    # -- the host's side --------------------------------------------------------------------------

    cdef void _accept(self) noexcept nogil:
        cdef int fd, left = ACCEPTS
        cdef Connection *one
        while left:
            left -= 1
            fd = accept4(self.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                # EAGAIN; or there are no descriptors left, until a connection ends or another client comes.
                self.accepting = errno == EINTR
                return
            one = table_add(self.table, fd)
            if one == NULL:
                close(fd)
                self.refused += 1
                continue
            one.state = LINE
            timer_set(self.table, one, LINE_TIMER, _now())
            self._begin_watch(one)
            self._read_line(one)

    cdef int _begin_watch(self, Connection *one) noexcept nogil:
        return self._watch(
            one.fd, EPOLLIN | EPOLLRDHUP | EPOLLET, <uint64_t>one.generation << 32 | one.slot
        )

    cdef void _event(self, Connection *one, uint32_t events) noexcept nogil:
        if events & (EPOLLHUP | EPOLLERR):
            one.hung_up = True
        if events & ~EPOLLOUT:
            one.readable = True
        if one.state == LINE:
            self._read_line(one)
        elif one.state == LINGERING:
            if one.hung_up:
                self._remove(one)
            else:
                self._flush(one)
        elif one.state == ESTABLISHED:
            if one.hung_up and (one.ended or one.guest_shut & NO_RECEIVE):
                self._shut(one, NOTHING_MORE)
                return
            self._ready(one)
            if events & EPOLLOUT and one.length:
                self._flush(one)

    cdef void _read_line(self, Connection *one) noexcept nogil:
        """CONNECT PORT, once it is there whole; a client that sends anything else goes."""
        cdef char line[LINE_LIMIT]
        cdef uint32_t end = 0
        cdef int64_t port
        cdef ssize_t length = recv(one.fd, line, LINE_LIMIT, MSG_PEEK)
        if length < 0 and (errno == EAGAIN or errno == EINTR):
            return
        if length <= 0:
            self._remove(one)
            return
        while end < length and line[end] != c"\n":
            end += 1
        if end == length:
            if length == LINE_LIMIT or one.hung_up:
                self._remove(one)
            return
        recv(one.fd, line, end + 1, 0)
        port = _port(line, end)
        if port < 0:
            self._remove(one)
            return
        one.guest_port = <uint32_t>port
        one.host_port = table_port(self.table, one.guest_port)
        table_hash(self.table, one)
        one.state = REQUESTED
        one.readable = True
        one.pending = TELL_REQUEST
        timer_set(self.table, one, GUEST_TIMER, _now())
        self._ready(one)

    cdef void _connect(self, Connection *one) noexcept nogil:
        """To the listener of the port that the guest wants; soon again while its backlog is full."""
        cdef sockaddr_un address
        cdef int length
        memset(&address, 0, sizeof(address))
        address.sun_family = AF_UNIX
        length = snprintf(address.sun_path, sizeof(address.sun_path), "%s_%u", self.path, one.host_port)
        if length >= sizeof(address.sun_path):
            self._kill(one)
            return
        if one.fd < 0:
            one.fd = socket_of(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if one.fd < 0:
            self._kill(one)
        elif connect(one.fd, <const sockaddr *>&address, sizeof(address)) == 0:
            link_remove(&one.timer)
            one.state = ESTABLISHED
            one.readable = True
            one.pending |= TELL_RESPONSE
            self._begin_watch(one)
            self._ready(one)
        elif errno == EAGAIN:
            timer_set(self.table, one, RETRY_TIMER, _now())
        else:
            self._kill(one)

    cdef void _flush(self, Connection *one) noexcept nogil:
        """Write what was kept for the client, as far as it has room."""
        cdef ssize_t sent
        if one.length:
            sent = send(one.fd, one.data + one.start, one.length, MSG_NOSIGNAL)
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    self._deaf(one)
                return
            buffer_drop(one, <uint32_t>sent)
            self.tx_bytes += sent
            self._forwarded(one, <uint32_t>sent)
        if one.state == LINGERING:
            if one.length == 0:
                self._remove(one)
            else:
                timer_set(self.table, one, LINGER_TIMER, _now())
        elif one.length == 0 and one.guest_shut & NO_SEND:
            shutdown(one.fd, SHUT_WR)

    cdef void _forwarded(self, Connection *one, uint32_t length) noexcept nogil:
        """Count what the client took, and tell the guest before it runs out of credit."""
        one.forwarded += length
        if one.forwarded - one.told >= TELL_AFTER and one.state == ESTABLISHED:
            one.pending |= TELL_CREDIT
            self._ready(one)

    cdef void _deaf(self, Connection *one) noexcept nogil:
        """The client takes no more. What it sent before may still be there for the guest."""
        one.deaf = True
        one.forwarded += one.length
        buffer_drop(one, one.length)
        if one.state == LINGERING:
            self._remove(one)
        elif one.ended or one.guest_shut & NO_RECEIVE:
            self._shut(one, NOTHING_MORE)
        else:
            self._shut(one, NO_RECEIVE)

    cdef void _shut(self, Connection *one, int flags) noexcept nogil:
        """Tell the guest what the client does no more; after NOTHING_MORE the client is history."""
        one.host_shut |= flags
        one.pending |= TELL_SHUTDOWN
        if one.host_shut == NOTHING_MORE:
            one.state = CLOSING
            one.pending &= TELL_RESPONSE | TELL_SHUTDOWN
            close(one.fd)
            one.fd = -1
            buffer_drop(one, one.length)
            timer_set(self.table, one, GUEST_TIMER, _now())
        link_append(&self.table.ready, &one.ready)

    cdef void _ready(self, Connection *one) noexcept nogil:
        """Give it a turn if it has anything for the guest."""
        if one.pending or (
            one.state == ESTABLISHED and one.readable and not one.ended and not one.guest_shut & NO_RECEIVE
        ):
            link_append(&self.table.ready, &one.ready)

    cdef void _kill(self, Connection *one) noexcept nogil:
        """End it at once on both sides, as far as they know of it."""
        if one.hashed and not one.pending & TELL_REQUEST:
            self._reset(one.host_port, one.guest_port, STREAM)
        self._remove(one)

    cdef void _remove(self, Connection *one) noexcept nogil:
        table_remove(self.table, one)
        self.accepting = True  # there may be a client whom we had no descriptor for

    cdef void _part(self, Connection *one) noexcept nogil:
        """The guest is done with it; the client gets what was sent to it before."""
        if one.length == 0:
            self._remove(one)
            return
        table_unhash(self.table, one)
        link_remove(&one.ready)
        one.pending = 0
        one.state = LINGERING
        timer_set(self.table, one, LINGER_TIMER, _now())

    # -- to the guest -----------------------------------------------------------------------------

    cdef int _receive(self) noexcept nogil:
        """Packets to the driver, until there are no more, or no chains, or a batch."""
        cdef int turns = 0, got = 0
        cdef uint64_t enough = self.rx_bytes + BATCH_BYTES
        cdef Connection *one
        while turns < RX_TURNS and self.rx_bytes < enough and self._has_news():
            turns += 1
            one = NULL
            if self.first_reset != self.end_reset:
                got = self._take(&self.stock[0])
                if got > 0:
                    self._reset_packet(&self.stock[0])
            else:
                one = link_first(&self.table.ready)
                if one.pending:
                    got = self._take(&self.stock[0])
                    if got > 0:
                        link_remove(&one.ready)
                        self._control_packet(one, &self.stock[0])
                        self._ready(one)
                else:
                    got = self._data_packets(one)
            if got < 0:
                break
            if got == 0:
                self.rx.flush()
                if self.rx.enable_kicks():
                    self.rx.disable_kicks()
                    continue
                self.rx_more = False
                break
        self.rx.flush()
        return got if got < 0 else 0

    cdef int _take(self, Buffers *chain) noexcept nogil:
        """A chain to receive into: 1, 0 for none now, negative where the driver broke a rule."""
        cdef int got = self.rx.take(chain)
        if got < 0:
            return -EPROTO
        if got and chain.readable:
            self.problem = READABLE_BUFFER
            return -EPROTO
        if got and chain.writable_length <= HEADER_SIZE:
            self.problem = SHORT_BUFFER
            return -EPROTO
        return got

    cdef void _reset_packet(self, Buffers *chain) noexcept nogil:
        cdef Header header
        cdef Reset *reset = &self.resets[self.first_reset & (MAX_RESETS - 1)]
        self.first_reset += 1
        memset(&header, 0, sizeof(header))
        header.src_cid, header.dst_cid = HOST_CID, self.cid
        header.src_port, header.dst_port = reset.host_port, reset.guest_port
        header.type, header.op = reset.type, RST
        header_write(chain, &header)
        self.rx.complete(chain, HEADER_SIZE)

    cdef void _control_packet(self, Connection *one, Buffers *chain) noexcept nogil:
        """One of what is pending, the most urgent."""
        if one.pending & TELL_RESPONSE:
            one.pending &= ~TELL_RESPONSE
            self._put_packet(one, chain, RESPONSE, 0, 0)
        elif one.pending & TELL_REQUEST:
            one.pending &= ~TELL_REQUEST
            self._put_packet(one, chain, REQUEST, 0, 0)
        elif one.pending & TELL_SHUTDOWN:
            one.pending &= ~TELL_SHUTDOWN
            self._put_packet(one, chain, SHUTDOWN, one.host_shut, 0)
        elif one.pending & ASK_CREDIT:
            one.pending &= ~ASK_CREDIT
            self._put_packet(one, chain, CREDIT_REQUEST, 0, 0)
        else:
            self._put_packet(one, chain, CREDIT_UPDATE, 0, 0)

    cdef void _put_packet(self, Connection *one, Buffers *chain, int op, uint32_t flags, uint32_t length) noexcept nogil:
        """Complete a chain whose payload is there; every packet tells the guest its credit."""
        cdef Header header
        header.src_cid, header.dst_cid = HOST_CID, self.cid
        header.src_port, header.dst_port = one.host_port, one.guest_port
        header.length, header.type, header.op, header.flags = length, STREAM, <uint16_t>op, flags
        header.buf_alloc, header.fwd_cnt = BUFFER, one.forwarded
        one.told = one.forwarded
        one.pending &= ~TELL_CREDIT
        header_write(chain, &header)
        self.rx.complete(chain, HEADER_SIZE + length)

    cdef int _data_packets(self, Connection *one) noexcept nogil:
        """Read once from the client into as many chains as may fill; 0: there is no chain, negative: broken."""
        cdef uint32_t budget = credit(one), room = 0, count = 0, vectors = 0, used = 0, here, got_chains
        cdef Buffers *chain
        cdef ssize_t length
        cdef int got = 0
        link_remove(&one.ready)
        if budget == 0:
            # Asked once: the guest tells by itself when it has room, and the answer may be that it has none.
            if not one.asked:
                one.asked = True
                one.pending |= ASK_CREDIT
                self._ready(one)
            return 1
        if budget > TURN_BYTES:
            budget = TURN_BYTES
        while count < one.window and room < budget:
            chain = &self.stock[count]
            got = self._take(chain)
            if got < 0:
                return got
            if got == 0:
                break
            if vectors + chain.count > MAX_BUFFERS:
                self.rx.untake(chain.head)
                break
            here = budget - room
            if here > MAX_PAYLOAD:
                here = MAX_PAYLOAD
            if here > chain.writable_length - HEADER_SIZE:
                here = <uint32_t>(chain.writable_length - HEADER_SIZE)
            vectors += cut(chain.vectors, HEADER_SIZE, here, &self.vectors[vectors])
            self.rooms[count] = here
            room += here
            count += 1
        if count == 0:
            self._ready(one)
            return 0
        length = readv(one.fd, self.vectors, vectors)
        got = errno
        here = <uint32_t>length if length > 0 else 0
        got_chains = count
        while used < count and here:
            here -= min(here, self.rooms[used])
            used += 1
        while count > used:
            count -= 1
            self.rx.untake(self.stock[count].head)
        if length <= 0:
            if length < 0 and got == EAGAIN:
                one.readable = False
            elif length == 0 or got != EINTR:
                # The end; or the client left without reading all it got, which is an end as well.
                one.ended = True
                one.hung_up = one.hung_up or length < 0
                self._shut(one, NOTHING_MORE if one.hung_up or one.deaf else NO_SEND)
                return 1
            self._ready(one)
            return 1
        here = <uint32_t>length
        for count in range(used):
            room = min(here, self.rooms[count])
            self._put_packet(one, &self.stock[count], RW, 0, room)
            here -= room
        one.sent += <uint32_t>length
        self.rx_bytes += length
        if used == got_chains:
            one.window = min(<uint32_t>MAX_GATHER, used * 2)
        else:
            one.window = used
        self._ready(one)
        return 1

    # -- from the guest ---------------------------------------------------------------------------

    cdef int _transmit(self) noexcept nogil:
        """Packets from the driver, until there are no more, or a batch."""
        cdef int packets = 0, got, result = 0
        cdef uint64_t enough = self.tx_bytes + BATCH_BYTES
        self.tx.disable_kicks()
        while (
            packets < TX_BATCH
            and self.tx_bytes < enough
            and self.end_reset - self.first_reset < ENOUGH_RESETS
        ):
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
            self._packet()
            self.tx.put(self.chain.head, 0)
        self.tx.flush()
        return result

    cdef void _packet(self) noexcept nogil:
        """Obey the packet in ``chain``, or answer it with a RST."""
        cdef Header header
        cdef Connection *one
        if self.chain.readable_length < HEADER_SIZE:
            self.dropped += 1
            return
        header_read(&self.chain, &header)
        if header.dst_cid != HOST_CID or header.src_cid != self.cid:
            self.dropped += 1
            return
        one = NULL
        if header.type == STREAM:
            one = table_find(self.table, header.dst_port, header.src_port)
        if one == NULL:
            if header.op == REQUEST and header.type == STREAM:
                self._asked(&header)
            elif header.op != RST:
                self._reset(header.dst_port, header.src_port, header.type)
            return
        if header.length > self.chain.readable_length - HEADER_SIZE:
            self._kill(one)
            return
        one.peer_alloc, one.peer_taken = header.buf_alloc, header.fwd_cnt
        if one.asked and credit(one):
            one.asked = False
        if header.op == RW:
            self._data(one, header.length)
        elif header.op == CREDIT_UPDATE:
            self._ready(one)
        elif header.op == CREDIT_REQUEST:
            if one.state == ESTABLISHED:
                one.pending |= TELL_CREDIT
                self._ready(one)
        elif header.op == SHUTDOWN:
            self._shut_by_guest(one, header.flags)
        elif header.op == RESPONSE:
            self._answered(one)
        elif header.op == RST:
            self._part(one)
        else:
            self._kill(one)  # a second REQUEST, and what no one knows

    cdef void _asked(self, const Header *header) noexcept nogil:
        """The guest wants to connect to a port of the host."""
        cdef Connection *one = table_add(self.table, -1)
        if one == NULL:
            self.refused += 1
            self._reset(header.dst_port, header.src_port, STREAM)
            return
        one.host_port, one.guest_port = header.dst_port, header.src_port
        one.peer_alloc, one.peer_taken = header.buf_alloc, header.fwd_cnt
        table_hash(self.table, one)
        one.state = CONNECTING
        one.since = _now()
        self._connect(one)

    cdef void _answered(self, Connection *one) noexcept nogil:
        """The guest takes the connection that a client asked for."""
        cdef char line[LINE_LIMIT]
        cdef int length
        if one.state != REQUESTED or one.pending & TELL_REQUEST:
            self._kill(one)
            return
        link_remove(&one.timer)
        one.state = ESTABLISHED
        length = snprintf(line, sizeof(line), "OK %u\n", one.host_port)
        send(one.fd, line, length, MSG_NOSIGNAL)  # there is room; a client that went shows when it is read
        self._ready(one)

    cdef void _shut_by_guest(self, Connection *one, uint32_t flags) noexcept nogil:
        one.guest_shut |= flags & NOTHING_MORE
        if one.guest_shut == NOTHING_MORE:
            self._reset(one.host_port, one.guest_port, STREAM)
            self._part(one)
            return
        if one.state != ESTABLISHED:
            return
        if one.guest_shut & NO_RECEIVE:
            shutdown(one.fd, SHUT_RD)  # what a client sends from now on fails
            link_remove(&one.ready)
        if one.guest_shut & NO_SEND and one.length == 0:
            shutdown(one.fd, SHUT_WR)
        self._ready(one)

    cdef void _data(self, Connection *one, uint32_t length) noexcept nogil:
        """Forward a payload. One that comes before its time, or beyond the credit, ends the connection."""
        cdef msghdr message
        cdef ssize_t sent
        cdef uint32_t done = 0
        cdef epoll_event event
        if one.state == CLOSING:
            return
        if one.state != ESTABLISHED or one.guest_shut & NO_SEND or length > BUFFER - (one.received - one.forwarded):
            self._kill(one)
            return
        one.received += length
        if one.deaf:
            one.forwarded += length
            length = 0
        if length == 0:
            self._ready(one)
            return
        if one.length == 0:
            memset(&message, 0, sizeof(message))
            message.msg_iov = self.vectors
            message.msg_iovlen = cut(self.chain.vectors, HEADER_SIZE, length, self.vectors)
            sent = sendmsg(one.fd, &message, MSG_NOSIGNAL)
            if sent < 0 and errno != EAGAIN and errno != EINTR:
                one.forwarded += length
                self._deaf(one)
                return
            done = <uint32_t>sent if sent > 0 else 0
            self.tx_bytes += done
            self._forwarded(one, done)
        if done < length:
            if not buffer_add(one, self.chain.vectors, HEADER_SIZE + done, length - done):
                self._kill(one)
                return
            if not one.watches_room:
                # For good: it takes much, and room that nobody waits for costs a bulk connection little.
                one.watches_room = True
                event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
                event.data.u64 = <uint64_t>one.generation << 32 | one.slot
                epoll_ctl(self.epoll, EPOLL_CTL_MOD, one.fd, &event)
        self._ready(one)

    cdef void _reset(self, uint32_t host_port, uint32_t guest_port, uint16_t type) noexcept nogil:
        """Queue a RST. There is room: see ENOUGH_RESETS; beside those, each connection makes one."""
        cdef Reset *reset
        if self.end_reset - self.first_reset < MAX_RESETS:
            reset = &self.resets[self.end_reset & (MAX_RESETS - 1)]
            reset.host_port, reset.guest_port, reset.type = host_port, guest_port, type
            self.end_reset += 1


cdef int64_t _port(const char *line, uint32_t length) noexcept nogil:
    """The port in ``CONNECT PORT``, the word in any case and blanks around the number; -1 for anything else."""
    cdef int64_t port = 0
    cdef uint32_t index = 7, digits = 0
    if length < 9 or strncasecmp(line, "CONNECT", 7) != 0 or line[7] != c" ":
        return -1
    while index < length and line[index] == c" ":
        index += 1
    while index < length and c"0" <= line[index] <= c"9":
        port = port * 10 + line[index] - c"0"
        index += 1
        digits += 1
    while index < length and (line[index] == c" " or line[index] == c"\r"):
        index += 1
    return port if index == length and 1 <= digits <= 10 and port < <int64_t>1 << 32 else -1


cdef int64_t _now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec * 1000000000 + time.tv_nsec

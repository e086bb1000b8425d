# cython: cdivision=True
"""A driver of virtio-net that sends or takes packets as fast as it can: compiled, without the GIL.

It polls its used rings, and so wants no interrupt. Beside it are the same loops on a bare TAP. All measure alike:
after a warm-up they write a line "go" to standard output, and in the end return the packets since then, and
the seconds.

Source: virtio 1.2, 2.7 and 5.1.6
"""

import os

from libc.errno cimport EAGAIN, EINTR, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from pileus._posix cimport (
    eventfd_signal,
    full_fence,
    iovec,
    load_acquire_u16,
    load_u16,
    read,
    store_release_u16,
    store_u16,
    write,
)
from pileus.memory._space cimport GuestMemory


cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct mmsghdr:
        msghdr msg_hdr
    ssize_t send(int fd, const void *data, size_t length, int flags)
    ssize_t recv(int fd, void *data, size_t length, int flags)
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)
    int MSG_DONTWAIT


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    int CLOCK_MONOTONIC


cdef extern from *:
    void relax "__builtin_ia32_pause"() nogil


cdef enum:
    SIZE = 256              # descriptors of a ring
    PAGE = 4096
    AVAILABLE = 0x2000      # of a ring, from its descriptors
    USED = 0x4000
    RING_BYTES = USED + 6 + 8 * SIZE
    NUM_BUFFERS = 10        # in the header of a packet: the chains it takes
    BATCH = 32
    LARGEST = 1 << 17       # bytes of a packet, and more
    TURNS = 32              # between looks at the clock
    PATIENCE = 60           # seconds

cdef double WARM_UP = 0.3


cdef struct Descriptor:
    uint64_t gpa
    uint32_t length
    uint16_t flags
    uint16_t next


cdef struct Ring:
    Descriptor *table
    uint16_t *avail
    uint16_t *used
    uint16_t next_avail
    uint16_t next_used
    uint16_t kicked
    int kick_fd
    const char *text        # what kicks by ``kick_fd``; empty where that is an eventfd
    size_t text_length


cdef struct Window:         # of time, in which packets count
    double seconds
    double began
    double ends
    uint64_t before         # packets until it opened
    uint32_t turns
    uint32_t looks          # at the clock, every so many turns


cdef class NetLoad:
    """A pair of queues of 256, at ``places`` in ``memory``: receive, transmit. Descriptors lie first in a ring.

    A queue is kicked by its eventfd of ``kicks``; by its text of ``texts``, where it has one, written to that
    socket, whose answers are thrown away. A turn of what is measured raises OSError where the device is silent.
    """

    cdef GuestMemory memory             # keeps the mapping alive
    cdef tuple texts                    # keeps them alive
    cdef Ring[2] rings
    cdef uint8_t *buffers[SIZE]         # of the receive queue, by descriptor
    cdef uint16_t[SIZE] taken           # received, not yet offered anew
    cdef uint32_t count                 # of them
    cdef uint32_t left                  # chains still to come of the packet under way

    def __init__(self, GuestMemory memory not None, tuple places not None, tuple kicks not None,
                 tuple texts=(b"", b"")):
        cdef int number
        cdef uint8_t *at
        cdef bytes text
        self.memory, self.texts = memory, texts
        for number in range(2):
            at = memory.at(places[number], RING_BYTES)
            if at == NULL:
                raise ValueError(f"a ring at {places[number]:#x} is not in memory")
            text = texts[number]
            memset(&self.rings[number], 0, sizeof(Ring))
            self.rings[number].table = <Descriptor *>at
            self.rings[number].avail = <uint16_t *>(at + AVAILABLE)
            self.rings[number].used = <uint16_t *>(at + USED)
            self.rings[number].kick_fd = kicks[number]
            self.rings[number].text, self.rings[number].text_length = text, len(text)
            store_u16(&self.rings[number].avail[2 + SIZE], <uint16_t>-2)   # used_event: never

    def describe(self, bint transmit, uint32_t index, uint64_t gpa, uint32_t length, uint16_t flags):
        """Write a descriptor. Each of a queue must be there before what uses it begins."""
        cdef Descriptor *one
        cdef uint8_t *place = self.memory.at(gpa, length)
        if index >= SIZE or place == NULL or length < NUM_BUFFERS + 2:
            raise ValueError(f"descriptor {index}: {length} bytes at {gpa:#x}")
        one = &self.rings[transmit].table[index]
        one.gpa, one.length, one.flags, one.next = gpa, length, flags, 0
        if not transmit:
            self.buffers[index] = place

    def send(self, double seconds):
        """All 256 chains of the transmit queue, again and again."""
        cdef Window window = _window(seconds, TURNS)
        cdef uint64_t done = 0
        with nogil:
            self._send(&window, &done)
        return _report(&window, done)

    def receive(self, int fd, bytes packet not None, uint64_t most, double seconds):
        """What the packet socket ``fd`` sends: copies of ``packet``, up to ``most`` of them under way."""
        cdef Window window = _window(seconds, TURNS)
        cdef const char *data = packet
        cdef size_t length = len(packet)
        cdef uint64_t sent = 0, done = 0
        self._need_buffers()
        with nogil:
            self._offer_all(&self.rings[0])
            while _going(&window, done):
                sent += _send_batch(fd, data, length, <int64_t>(sent - done), most)
                done += self._recycle()
        return _report(&window, done)

    def round_trips(self, int fd, int listener, bytes frame not None, double seconds):
        """``frame`` from the packet socket ``fd`` to the receive queue; then a packet back, to ``listener``."""
        cdef Window window = _window(seconds, 1)
        cdef const char *data = frame
        cdef size_t length = len(frame)
        cdef uint64_t done = 0
        cdef int rc
        self._need_buffers()
        with nogil:
            rc = self._round_trips(&window, &done, fd, listener, data, length)
        _check(rc)
        return _report(&window, done)

    def _need_buffers(self):
        cdef int index
        for index in range(SIZE):
            if self.buffers[index] == NULL:
                raise ValueError(f"buffer {index} is not described")

    cdef void _send(self, Window *window, uint64_t *done) noexcept nogil:
        cdef Ring *ring = &self.rings[1]
        cdef uint32_t count
        cdef uint16_t head
        self._offer_all(ring)
        while _going(window, done[0]):
            count = 0
            while count < BATCH and _take(ring, &head):
                _add(ring, head)
                count += 1
            done[0] += count
            _publish(ring)
            relax()

    cdef int _round_trips(self, Window *window, uint64_t *done, int fd, int listener, const char *data,
                          size_t length) noexcept nogil:
        cdef uint8_t[LARGEST] answer
        cdef Ring *transmit = &self.rings[1]
        cdef double limit = _now() + PATIENCE
        cdef uint16_t head
        self._offer_all(&self.rings[0])
        while _going(window, done[0]):
            if send(fd, data, length, 0) < 0:
                return -errno
            while not self._recycle():
                if _now() > limit:
                    return -ETIMEDOUT
            _add(transmit, <uint16_t>(done[0] & (SIZE - 1)))
            _publish(transmit)
            while recv(listener, answer, sizeof(answer), 0) < 0:
                if errno != EAGAIN and errno != EINTR:
                    return -errno
                if _now() > limit:
                    return -ETIMEDOUT
            while not _take(transmit, &head):
                if _now() > limit:
                    return -ETIMEDOUT
            done[0] += 1
        return 0

    cdef void _offer_all(self, Ring *ring) noexcept nogil:
        cdef uint16_t index
        for index in range(SIZE):
            _add(ring, index)
        _publish(ring)

    cdef uint32_t _recycle(self) noexcept nogil:
        """Take received chains back; the packets that begin in them. As Linux does, offer them anew by 32."""
        cdef Ring *ring = &self.rings[0]
        cdef uint32_t packets = 0
        cdef uint16_t head
        while self.count < SIZE and _take(ring, &head):
            if self.left == 0:
                self.left = max(load_u16(<uint16_t *>(self.buffers[head] + NUM_BUFFERS)), <uint16_t>1)
                packets += 1
            self.left -= 1
            self.taken[self.count] = head
            self.count += 1
        if self.count > BATCH:
            while self.count:
                self.count -= 1
                _add(ring, self.taken[self.count])
            _publish(ring)
        return packets


# -- rings -----------------------------------------------------------------------------------------------


cdef inline void _add(Ring *ring, uint16_t head) noexcept nogil:
    ring.avail[2 + (ring.next_avail & (SIZE - 1))] = head
    ring.next_avail += 1


cdef inline bint _take(Ring *ring, uint16_t *head) noexcept nogil:
    """The head of the next used chain. A device that answers a wrong one spoils figures, no memory."""
    if load_acquire_u16(&ring.used[1]) == ring.next_used:
        return False
    head[0] = <uint16_t>(<uint32_t *>&ring.used[2])[2 * (ring.next_used & (SIZE - 1))] & (SIZE - 1)
    ring.next_used += 1
    return True


cdef void _publish(Ring *ring) noexcept nogil:
    """Show the device what was added; kick it if it wants that."""
    cdef uint16_t event, before = ring.kicked
    if before == ring.next_avail:
        return
    store_release_u16(&ring.avail[1], ring.next_avail)
    full_fence()    # the index before the look at avail_event, which the device writes before it looks again
    event = load_u16(&ring.used[2 + 4 * SIZE])
    ring.kicked = ring.next_avail
    if <uint16_t>(ring.next_avail - event - 1) < <uint16_t>(ring.next_avail - before):
        _kick(ring)


cdef void _kick(Ring *ring) noexcept nogil:
    cdef char[4096] answers
    if not ring.text_length:
        eventfd_signal(ring.kick_fd)
        return
    write(ring.kick_fd, ring.text, ring.text_length)
    while recv(ring.kick_fd, answers, sizeof(answers), MSG_DONTWAIT) > 0:
        pass


# -- time ------------------------------------------------------------------------------------------------


cdef double _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef Window _window(double seconds, uint32_t looks):
    cdef Window window
    memset(&window, 0, sizeof(window))
    window.seconds, window.looks = seconds, looks
    return window


cdef bint _going(Window *window, uint64_t done) noexcept nogil:
    """True until the time is over; ``done`` packets so far."""
    cdef double now
    window.turns += 1
    if window.turns % window.looks:
        return True
    now = _now()
    if not window.began:
        window.began = now
    if not window.ends and now - window.began >= WARM_UP:
        window.ends, window.began, window.before = now + window.seconds, now, done
        write(1, b"go\n", 3)
    return not window.ends or now < window.ends


cdef _report(Window *window, uint64_t done):
    return done - window.before, _now() - window.began


cdef _check(int rc):
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))


# -- packets without rings -------------------------------------------------------------------------------


cdef uint64_t _send_batch(int fd, const char *data, size_t length, int64_t under_way, uint64_t most) noexcept nogil:
    """Send up to a batch, as far as the TAP's queue is sure to have room."""
    cdef mmsghdr[BATCH] messages
    cdef iovec vector
    cdef int index, sent, count = <int>min(<int64_t>BATCH, <int64_t>most - under_way)
    if count <= 0:
        return 0
    vector.iov_base, vector.iov_len = <void *>data, length
    memset(messages, 0, count * sizeof(mmsghdr))
    for index in range(count):
        messages[index].msg_hdr.msg_iov, messages[index].msg_hdr.msg_iovlen = &vector, 1
    sent = sendmmsg(fd, messages, count, 0)
    return sent if sent > 0 else 0


def send_plainly(int tap, GuestMemory memory not None, uint64_t stride, uint32_t length, double seconds):
    """256 packets of ``length`` bytes, ``stride`` apart in ``memory``, again and again to ``tap``."""
    cdef Window window = _window(seconds, TURNS)
    cdef uint64_t done = 0
    cdef uint8_t *packets = memory.at(0, SIZE * stride)
    if packets == NULL or length > stride:
        raise ValueError("the memory is too small")
    with nogil:
        while _going(&window, done):
            done += write(tap, packets + (done & (SIZE - 1)) * stride, length) > 0
    return _report(&window, done)


def feed_plainly(int fd, bytes packet not None, uint64_t most, GuestMemory counter not None, double seconds):
    """As ``receive``, but it is ``take_plainly`` in another process that takes the packets."""
    cdef Window window = _window(seconds, TURNS)
    cdef const char *data = packet
    cdef size_t length = len(packet)
    cdef uint64_t sent = 0
    cdef volatile uint64_t *done = <volatile uint64_t *>counter.at(0, 8)
    if done == NULL:
        raise ValueError("the memory is too small")
    with nogil:
        while _going(&window, done[0]):
            sent += _send_batch(fd, data, length, <int64_t>(sent - done[0]), most)
    return _report(&window, done[0])


def take_plainly(int tap, GuestMemory counter not None, GuestMemory memory not None, uint32_t length):
    """Read packets of ``length`` bytes from ``tap`` until it fails, into pages in turn, as a driver's buffers are.

    Their number is kept in the first 8 bytes of ``counter``.
    """
    cdef uint64_t pages = (length + PAGE - 1) // PAGE, at = 0
    cdef uint8_t *buffers = memory.at(0, (SIZE + BATCH) * PAGE)
    cdef volatile uint64_t *done = <volatile uint64_t *>counter.at(0, 8)
    if buffers == NULL or done == NULL:
        raise ValueError("the memory is too small")
    with nogil:
        while read(tap, buffers + at * PAGE, BATCH * PAGE) > 0:
            done[0] += 1
            at = (at + pages) & (SIZE - 1)

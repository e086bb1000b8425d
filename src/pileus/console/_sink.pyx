"""Where a guest's console output goes: written at once, from any thread, never blocking.

A vCPU ``put``s bytes. What the other end does not take waits in a bounded queue; then ``wake_fd`` becomes
readable and the control loop calls ``drain`` whenever the other end is writable. When the queue is full
``put`` takes less than it is given, and the device keeps its guest waiting: that is the back-pressure.
Where nobody listens, bytes are dropped and counted. No failure of the other end reaches the guest.
"""

import os

from libc.errno cimport EAGAIN, EDQUOT, EFBIG, EINTR, EIO, ENOSPC, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from pileus._posix cimport (
    eventfd_consume,
    eventfd_signal,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    write,
)
from pileus.console._ring cimport ring_front, ring_init, ring_skip, ring_write


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    const short POLLERR, POLLHUP, POLLOUT


cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int, const void *, size_t, int)
    const int MSG_DONTWAIT, MSG_NOSIGNAL


cdef enum Mode:
    _WRITE = 0      # write(2) to a non-blocking description that is ours alone
    _SEND = 1       # a socket, whose description others may share: MSG_DONTWAIT
    _ONE_BYTE = 2   # a blocking description: one byte at a time, and only when poll(2) sees room
    _PTY = 3        # the master of a pty: nobody listens while no one holds its other end

WRITE = _WRITE
SEND = _SEND
ONE_BYTE = _ONE_BYTE
PTY = _PTY

cdef enum:
    _PENDING_MAX = 65536    # bytes

PENDING_MAX = _PENDING_MAX


cdef class Sink:
    """One way out for console bytes. The owner of the fd attaches it, and detaches it before closing it."""

    def __cinit__(self):
        cdef uint8_t *storage = <uint8_t *>malloc(_PENDING_MAX)   # costs no memory until it is used
        if storage == NULL:
            raise MemoryError
        ring_init(&self.pending, storage, _PENDING_MAX)
        pthread_mutex_init(&self.lock, NULL)
        self.fd = -1
        self.wake_fd = -1
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)
        free(self.pending.bytes)

    @property
    def attached(self):
        """Whether there is somewhere to write to: not before attach, nor after the other end went away."""
        return self.fd >= 0

    @property
    def pending(self):
        """Bytes that wait for the other end."""
        return self.pending.count

    @property
    def dropped(self):
        """Bytes that went nowhere so far."""
        return self.lost

    def attach(self, int fd, int mode):
        """Write to ``fd`` from now on, in one of the modes of this module; the caller closes it."""
        with nogil:
            self._switch(fd, mode)

    def detach(self):
        """Drop bytes from now on, and those pending. On return no thread uses the fd any more."""
        with nogil:
            self._switch(-1, _WRITE)

    def write(self, bytes data):
        """``put`` for Python: how many bytes of ``data`` were taken."""
        cdef const uint8_t *start = data
        cdef size_t length = len(data), taken
        with nogil:
            taken = self.put(start, length)
        return taken

    def drain(self):
        """Write what is pending as far as it goes; return how many bytes still wait."""
        cdef size_t left
        with nogil:
            eventfd_consume(self.wake_fd)
            pthread_mutex_lock(&self.lock)
            self._drain()
            left = self.pending.count
            pthread_mutex_unlock(&self.lock)
        return left

    def take_error(self):
        """The errno of the first failure since the last call, or 0."""
        cdef int error = self.error
        self.error = 0
        return error

    def close(self):
        """Detach and close ``wake_fd``."""
        self.detach()
        if self.wake_fd >= 0:
            os.close(self.wake_fd)
            self.wake_fd = -1

    cdef size_t put(self, const uint8_t *data, size_t length) noexcept nogil:
        cdef size_t taken
        pthread_mutex_lock(&self.lock)
        taken = self._put(data, length)
        pthread_mutex_unlock(&self.lock)
        return taken

    cdef size_t _put(self, const uint8_t *data, size_t length) noexcept nogil:
        cdef ssize_t done = 0
        if self.fd < 0:
            self.lost += length
            return length
        if self.pending.count == 0:
            done = self._write(data, length)
            if done < 0:
                self._fail(<int>-done, length)
                return length
            if <size_t>done < length:
                eventfd_signal(self.wake_fd)
        return done + ring_write(&self.pending, data + done, length - done)

    cdef ssize_t _write(self, const uint8_t *data, size_t length) noexcept nogil:
        """How many bytes were written, 0 if that would block, or -errno."""
        cdef ssize_t done
        cdef int hung_up = False
        if self.mode == _SEND:
            done = send(self.fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL)
        else:
            if self.mode != _WRITE and self._would_block(&hung_up):
                return 0
            if hung_up and self.mode == _PTY:
                return -EIO
            done = write(self.fd, data, 1 if self.mode == _ONE_BYTE else length)
        if done >= 0:
            return done
        return 0 if errno == EAGAIN or errno == EINTR else -errno

    cdef bint _would_block(self, int *hung_up) noexcept nogil:
        cdef pollfd ready
        ready.fd = self.fd
        ready.events = POLLOUT
        ready.revents = 0
        poll(&ready, 1, 0)
        hung_up[0] = (ready.revents & POLLHUP) != 0
        return not ready.revents & (POLLOUT | POLLHUP | POLLERR)

    cdef void _drain(self) noexcept nogil:
        cdef size_t run = 0
        cdef uint8_t *front
        cdef ssize_t done
        while self.fd >= 0 and self.pending.count:
            front = ring_front(&self.pending, &run)
            done = self._write(front, run)
            if done == 0:
                return
            if done < 0:
                self._fail(<int>-done, self.pending.count)
                return
            ring_skip(&self.pending, done)

    cdef void _fail(self, int error, size_t lost) noexcept nogil:
        """Count what is lost. A full disk may get room again and a pty a reader; others never come back."""
        self.lost += lost
        self.pending.count = self.pending.head = 0
        if self.mode == _PTY and error == EIO:
            return
        if self.error == 0:
            self.error = error
            eventfd_signal(self.wake_fd)
        if error != ENOSPC and error != EDQUOT and error != EFBIG:
            self.fd = -1

    cdef void _switch(self, int fd, int mode) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.lost += self.pending.count
        self.pending.count = self.pending.head = 0
        self.fd = fd
        self.mode = mode
        pthread_mutex_unlock(&self.lock)

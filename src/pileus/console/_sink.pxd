from libc.stdint cimport uint8_t, uint64_t

from pileus._posix cimport pthread_mutex_t
from pileus.console._ring cimport Ring


cdef class Sink:
    cdef pthread_mutex_t lock   # over all below; held across non-blocking writes only
    cdef readonly int wake_fd   # eventfd: drain() has something to do
    cdef int fd                 # borrowed; -1: nobody listens
    cdef int mode               # how to write to fd
    cdef int error              # errno of the first failure that nobody took yet
    cdef uint64_t lost          # bytes dropped
    cdef Ring pending

    # From any thread. Returns how many bytes were taken (written, kept or dropped): fewer than ``length``
    # only while the other end does not read and ``pending`` is full. Never blocks.
    cdef size_t put(self, const uint8_t *data, size_t length) noexcept nogil

    cdef size_t _put(self, const uint8_t *data, size_t length) noexcept nogil
    cdef ssize_t _write(self, const uint8_t *data, size_t length) noexcept nogil
    cdef bint _would_block(self, int *hung_up) noexcept nogil
    cdef void _drain(self) noexcept nogil
    cdef void _fail(self, int error, size_t lost) noexcept nogil
    cdef void _switch(self, int fd, int mode) noexcept nogil

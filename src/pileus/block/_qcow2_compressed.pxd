from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pileus._posix cimport pthread_mutex_t
from pileus.block._transfer cimport Cursor


cdef class Compressed:
    # Reads compressed clusters, from any thread; keeps the last one.
    cdef int _fd
    cdef uint32_t _align, _cluster_bits
    cdef bint _zstd
    cdef pthread_mutex_t _lock          # of the two below
    cdef uint8_t *_last
    cdef uint64_t _last_entry           # the L2 entry of what is in _last; 0 if nothing is

    # Where the bytes of an L2 entry are, and how many.
    cdef void span(self, uint64_t entry, uint64_t *offset, uint64_t *length) noexcept nogil
    # Put ``length`` bytes of the cluster, from ``skip`` on, where the cursor is. 0 or -errno.
    cdef int read(self, uint64_t entry, size_t skip, size_t length, Cursor *cursor) noexcept nogil
    cdef int _unpack(self, uint64_t entry, uint8_t *cluster) noexcept nogil

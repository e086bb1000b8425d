from libc.stdint cimport uint64_t

from pileus._posix cimport pthread_mutex_t


cdef class ClusterSet:
    # Cluster numbers, below 2^62. Any thread may ask and change it. -ENOMEM is the only error.
    cdef pthread_mutex_t _lock
    cdef uint64_t *_places      # number + 1; 0 is empty
    cdef uint64_t _mask
    cdef uint64_t _count

    cdef bint holds(self, uint64_t cluster) noexcept nogil
    cdef bint holds_any(self, uint64_t first, uint64_t count) noexcept nogil
    cdef int add(self, uint64_t cluster) noexcept nogil     # 1 if it was there already
    cdef void remove(self, uint64_t cluster) noexcept nogil

"""A set of cluster numbers in 16 bytes or so for each: where an image keeps its tables, and data must not go."""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from pileus._posix cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef enum:
    FIRST_SIZE = 64  # places; a power of two


cdef inline uint64_t _home(uint64_t cluster, uint64_t mask) noexcept nogil:
    # Clusters come in runs, which stay runs under a mask alone; the multiplication spreads hostile choices.
    return ((cluster * <uint64_t>0x9E3779B97F4A7C15) >> 20) & mask


cdef class ClusterSet:
    """Open addressing with linear probing, at most half full."""

    def __cinit__(self):
        pthread_mutex_init(&self._lock, NULL)
        self._places = <uint64_t *>calloc(FIRST_SIZE, sizeof(uint64_t))
        if self._places == NULL:
            raise MemoryError
        self._mask = FIRST_SIZE - 1

    def __dealloc__(self):
        free(self._places)
        pthread_mutex_destroy(&self._lock)

    cdef bint holds(self, uint64_t cluster) noexcept nogil:
        cdef bint found
        pthread_mutex_lock(&self._lock)
        found = self._places[_search(self, cluster)] != 0
        pthread_mutex_unlock(&self._lock)
        return found

    cdef bint holds_any(self, uint64_t first, uint64_t count) noexcept nogil:
        cdef uint64_t cluster
        for cluster in range(first, first + count):
            if self.holds(cluster):
                return True
        return False

    cdef int add(self, uint64_t cluster) noexcept nogil:
        cdef uint64_t at
        cdef int rc = 0
        pthread_mutex_lock(&self._lock)
        if 2 * (self._count + 1) > self._mask:
            rc = _grow(self)
        if rc == 0:
            at = _search(self, cluster)
            if self._places[at]:
                rc = 1
            else:
                self._places[at] = cluster + 1
                self._count += 1
        pthread_mutex_unlock(&self._lock)
        return rc

    cdef void remove(self, uint64_t cluster) noexcept nogil:
        cdef uint64_t at
        pthread_mutex_lock(&self._lock)
        at = _search(self, cluster)
        if self._places[at]:
            self._count -= 1
            _close_gap(self, at)
        pthread_mutex_unlock(&self._lock)


cdef uint64_t _search(ClusterSet clusters, uint64_t cluster) noexcept nogil:
    """Where it is, or the empty place where it would go."""
    cdef uint64_t at = _home(cluster, clusters._mask)
    while clusters._places[at] and clusters._places[at] != cluster + 1:
        at = (at + 1) & clusters._mask
    return at


cdef void _close_gap(ClusterSet clusters, uint64_t hole) noexcept nogil:
    """Empty a place, moving up what was pushed past it: a search stops at the first empty place."""
    cdef uint64_t at = hole, home, mask = clusters._mask
    while True:
        clusters._places[hole] = 0
        while True:
            at = (at + 1) & mask
            if not clusters._places[at]:
                return
            home = _home(clusters._places[at] - 1, mask)
            if ((at - home) & mask) >= ((at - hole) & mask):
                break
        clusters._places[hole] = clusters._places[at]
        hole = at


cdef int _grow(ClusterSet clusters) noexcept nogil:
    cdef uint64_t size = 2 * (clusters._mask + 1), at, index
    cdef uint64_t *places = <uint64_t *>calloc(size, sizeof(uint64_t))
    if places == NULL:
        return -ENOMEM
    for index in range(clusters._mask + 1):
        if clusters._places[index]:
            at = _home(clusters._places[index] - 1, size - 1)
            while places[at]:
                at = (at + 1) & (size - 1)
            places[at] = clusters._places[index]
    free(clusters._places)
    clusters._places, clusters._mask = places, size - 1
    return 0

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pileus.block._cluster_set cimport ClusterSet
from pileus.block._slice_cache cimport SliceCache, Slot


cdef class Refcounts:
    # Who holds the image's writer lock calls these. 0 or -errno; -EIO also for an image that contradicts itself,
    # which ``corrupt`` then says.
    cdef readonly bint corrupt
    cdef readonly ClusterSet metadata   # clusters that guest data must never be written to
    cdef int _fd
    cdef uint32_t _align, _cluster_bits, _order, _block_bits, _slice_bits, _slice_entry_bits
    cdef uint64_t *_table               # the refcount table, in the host's byte order
    cdef uint64_t _entries, _table_offset
    cdef uint64_t _hint                 # no cluster below it is free
    cdef SliceCache _cache

    # Take up to ``wanted`` free clusters in a row, at least one; the first, or -errno.
    cdef int64_t allocate(self, uint64_t wanted, uint64_t *count) noexcept nogil
    # One reference less to each; *freed says how many are free now.
    cdef int drop(self, uint64_t first, uint64_t count, uint64_t *freed) noexcept nogil
    cdef int get(self, uint64_t cluster, uint64_t *value) noexcept nogil
    cdef bint is_dirty(self) noexcept nogil
    cdef int write_back(self) noexcept nogil

    cdef int _find(self, uint64_t cluster, Slot **slot) noexcept nogil
    cdef int _set(self, uint64_t cluster, uint64_t value) noexcept nogil
    cdef int _spoilt(self) noexcept nogil
    cdef int _make_block(self, uint64_t cluster) noexcept nogil
    cdef int _grow(self, uint64_t cluster) noexcept nogil

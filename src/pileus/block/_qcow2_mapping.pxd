from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pileus.block._slice_cache cimport SliceCache, Slot


cdef extern from *:
    """
    #define PILEUS_COPIED (UINT64_C(1) << 63)
    #define PILEUS_COMPRESSED (UINT64_C(1) << 62)
    #define PILEUS_ZERO UINT64_C(1)
    #define PILEUS_OFFSET UINT64_C(0x00fffffffffffe00)
    """
    const uint64_t COPIED "PILEUS_COPIED"           # of an entry: what it points at is this image's alone
    const uint64_t COMPRESSED "PILEUS_COMPRESSED"
    const uint64_t ZERO "PILEUS_ZERO"
    const uint64_t OFFSET_MASK "PILEUS_OFFSET"


cdef class Mapping:
    # Where each cluster of the virtual disk is. Its owner's lock is held for all of these; what changes
    # something needs the writer lock, too. 0 or -errno.
    cdef int _fd
    cdef uint32_t _align, _cluster_bits, _slice_bits
    cdef readonly uint32_t table_bits       # an L2 table has 1 << table_bits entries
    cdef readonly uint32_t slice_entry_bits
    cdef uint64_t *_l1                      # in the host's byte order
    cdef uint8_t *_l1_dirty                 # a byte for each 512 of the table
    cdef uint64_t _l1_size, _l1_offset
    cdef bint _l1_changed
    cdef SliceCache _cache

    # Point ``entries`` (big-endian) at the slice of L2 with ``cluster`` in it, or at NULL where there is no table.
    # -EAGAIN: all slots are dirty, and the writer has to write some back.
    cdef int find(self, uint64_t cluster, Slot **slot) noexcept nogil
    cdef uint64_t l1_entry(self, uint64_t cluster) noexcept nogil
    cdef void set_l1_entry(self, uint64_t cluster, uint64_t entry) noexcept nogil   # and forget the old table's slices
    cdef void set_entry(self, Slot *slot, uint64_t cluster, uint64_t entry) noexcept nogil
    cdef bint is_dirty(self) noexcept nogil
    cdef int write_tables(self) noexcept nogil
    cdef int write_l1(self, bint *wrote) noexcept nogil

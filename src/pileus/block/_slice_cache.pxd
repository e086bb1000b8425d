from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef struct Slot:
    uint64_t key        # which slice of the tables, plus 1; 0 while empty
    uint64_t place      # where it is in the file, in bytes
    uint32_t used       # the tick of its last use
    bint dirty
    uint8_t *data       # as in the file: big-endian


cdef class SliceCache:
    # Pieces of on-disk tables. Not locked: its owner is. Only ``write_back`` may run beside ``find`` and ``claim``.
    cdef readonly size_t slice_size     # bytes
    cdef readonly size_t dirty          # how many slots
    cdef Slot *_slots
    cdef uint64_t _sets
    cdef uint32_t _tick

    cdef Slot *find(self, uint64_t key) noexcept nogil
    # A slot for ``key``, whose data the caller fills at once; NULL if all it could have are dirty.
    cdef Slot *claim(self, uint64_t key, uint64_t place) noexcept nogil
    cdef void forget(self, Slot *slot) noexcept nogil
    cdef void touch(self, Slot *slot) noexcept nogil    # its data was changed
    cdef int write_back(self, int fd, uint32_t align) noexcept nogil

from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    CHUNK = 256             # mappings at most that one insertion moves


cdef struct Mapping:
    uint64_t first          # IOVA
    uint64_t last           # inclusive
    uint64_t gpa            # of ``first``
    uint32_t access


cdef struct Chunk:
    uint32_t count          # never 0
    Mapping[CHUNK] items    # ascending


cdef class Mappings:
    cdef Chunk **chunks     # ascending, no two neighbours so empty that they would fit in half a chunk
    cdef uint32_t length    # chunks
    cdef uint32_t capacity
    cdef readonly uint64_t count    # mappings

    # The mapping around ``iova``, or NULL; it stays where it is until the next change.
    cdef Mapping *at(self, uint64_t iova) noexcept nogil
    # 0, -EEXIST where some of it is mapped, -ENOMEM.
    cdef int add(self, uint64_t first, uint64_t last, uint64_t gpa, uint32_t access) noexcept nogil
    # How many were removed, all that are in [first, last]; -ERANGE, with none removed, where one is not whole in it.
    cdef long long remove(self, uint64_t first, uint64_t last) noexcept nogil
    cdef uint32_t _chunk(self, uint64_t iova) noexcept nogil
    cdef int _split(self, uint32_t index) noexcept nogil
    cdef int _insert_chunk(self, uint32_t index, Chunk *chunk) noexcept nogil
    cdef void _drop_chunk(self, uint32_t index) noexcept nogil
    cdef void _join(self, uint32_t index) noexcept nogil

from libc.stdint cimport uint64_t

# Guard a mapping: what ``unguard`` takes back, or -1 where no more can be.
cdef int guard(void *base, uint64_t size, uint64_t page_size) except -2
# Before it is unmapped.
cdef void unguard(int number) noexcept nogil

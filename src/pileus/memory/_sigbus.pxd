from libc.stdint cimport uint64_t


# From now on a fault in [base, base + size), of which the file behind has become too short, is survived.
# The number to give to ``unguard``, or -1 where no more mappings can be guarded. Raises OSError.
cdef int guard(void *base, uint64_t size, uint64_t page_size) except -2
# Before it is unmapped.
cdef void unguard(int number) noexcept nogil

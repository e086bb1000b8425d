from libc.stdint cimport uint64_t


# From now on a fault in [base, base + size), of which the file behind has become too short, is survived.
# 0, or -1 where no more mappings can be guarded.
cdef int guard(void *base, uint64_t size, uint64_t page_size) noexcept nogil
# Before it is unmapped.
cdef void unguard(void *base) noexcept nogil

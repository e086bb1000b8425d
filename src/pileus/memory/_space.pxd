from libc.stdint cimport uint8_t, uint64_t


cdef struct Span:
    uint64_t gpa
    uint64_t size
    uint8_t *hva
    uint64_t *dirty    # a bit per page, set by our own writes; NULL while nobody asks


cdef enum:
    MAX_SPANS = 64


cdef class Region:
    cdef readonly int fd             # the memfd or file behind it, -1: none
    cdef readonly uint64_t offset    # of the region in that file, in bytes
    cdef readonly uint64_t size
    cdef readonly uint64_t page_size
    cdef readonly bint private       # what is written stays in this process
    cdef uint8_t *base
    cdef int exports                 # memoryviews alive: unmapping under them would leave them dangling

    cdef _check_unused(self)
    cdef _advise(self, int advice, str doing)
    # Whole pages that the host gets back; 0 or -errno.
    cdef int give_back(self, uint64_t offset, uint64_t length) noexcept nogil


cdef class GuestMemory:
    cdef Span spans[MAX_SPANS]
    cdef size_t count
    cdef readonly list regions       # RAM: of (gpa, Region), ascending; the first of ``spans``
    cdef readonly list attached      # what is no RAM, but memory for devices all the same: likewise
    cdef readonly uint64_t size
    cdef bint tracked                # whether ``mark`` has anything to do

    cdef _add_span(self, uint64_t gpa, Region region)

    # The host address of [gpa, gpa + length), or NULL if that is not all in one region. A length of 0 is NULL.
    cdef uint8_t *at(self, uint64_t gpa, uint64_t length) noexcept nogil
    # Tell dirty tracking that [gpa, gpa + length), which lies in one region, was written by us.
    cdef void mark(self, uint64_t gpa, uint64_t length) noexcept nogil
    # The host address of gpa and how many bytes follow it in its region, or NULL.
    cdef uint8_t *reach(self, uint64_t gpa, uint64_t *available) noexcept nogil

from libc.stdint cimport uint8_t, uint32_t, uint64_t


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
    cdef uint64_t lead               # mapped bytes before the region, which may begin within a page
    cdef uint64_t mapped
    cdef int guarded   # a number of _sigbus, -1 for none
    cdef int exports                 # memoryviews alive: unmapping under them would leave them dangling

    cdef _check_unused(self)
    cdef _advise(self, int advice, str doing)
    cdef void _unmap(self, uint8_t *base) noexcept nogil
    # Whole pages that the host gets back; 0 or -errno.
    cdef int give_back(self, uint64_t offset, uint64_t length) noexcept nogil


cdef class GuestMemory:
    cdef Span spans[MAX_SPANS]
    cdef size_t count
    cdef readonly list regions       # RAM: of (gpa, Region), ascending; the first of ``spans``
    cdef readonly list attached      # what is no RAM, but memory for devices all the same: likewise
    cdef readonly uint64_t size
    cdef uint8_t *log                # a bit per page by gpa, for a peer that copies memory; or NULL
    cdef Region log_region
    cdef bint tracked                # whether ``mark`` has anything to do

    cdef _add_span(self, uint64_t gpa, Region region)

    # The host address of [gpa, gpa + length), or NULL if that is not all in one region. A length of 0 is NULL.
    cdef uint8_t *at(self, uint64_t gpa, uint64_t length) noexcept nogil
    # Tell dirty tracking that [gpa, gpa + length), which lies in one region, was written by us.
    cdef void mark(self, uint64_t gpa, uint64_t length) noexcept nogil
    # The host address of gpa and how many bytes follow it in its region, or NULL.
    cdef uint8_t *reach(self, uint64_t gpa, uint64_t *available) noexcept nogil


cdef enum:
    READ = 1                # what a device may do in a window: virtio 1.2, 5.13.6.5
    WRITE = 2

cdef enum:                  # why an access is refused: virtio 1.2, 5.13.6.9
    NO_DOMAIN = 1           # the device is in no address space
    NO_MAPPING = 2          # not mapped, or not for this


cdef struct Window:         # IOVAs that are GPAs, as far as they neighbour each other
    uint64_t first
    uint64_t last           # inclusive
    uint64_t gpa            # of ``first``
    uint32_t access         # READ, WRITE; 0: no window at all


cdef class Translation:
    # A device's own address space, as its virtual IOMMU makes it; ``_iommu.Endpoint`` is one. ``generation``
    # changes when a window that was found may be one no more. All but ``report`` is between enter and leave, which
    # nest in nothing; whoever changes the address space waits for those who are inside.
    cdef uint64_t generation

    cdef void enter(self) noexcept nogil
    cdef void leave(self) noexcept nogil
    # The window around ``iova``: 0, or the reason why there is none.
    cdef int find(self, uint64_t iova, Window *window) noexcept nogil
    # Tell the driver of the IOMMU about an access that was refused.
    cdef void report(self, int reason, uint32_t access, uint64_t iova) noexcept nogil

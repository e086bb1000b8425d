"""A window: memory that the guest sees besides its RAM, in which parts of files come and go.

Where no file is, zeroes are read, and writing is an error of who does it. Nothing that is asked for reaches
outside of the window.

Source: mmap(2), MAP_FIXED
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t


cdef extern from "<sys/mman.h>" nogil:
    void *c_mmap "mmap"(void *place, size_t length, int access, int flags, int fd, int64_t offset)
    int munmap(void *place, size_t length)
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE
    void *MAP_FAILED


cdef enum:
    PAGE = 4096


cdef class FileWindow:
    """``size`` bytes, a multiple of pages. Any thread may call; raises OSError, and nothing has changed."""

    def __init__(self, uint64_t size):
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        cdef void *base
        if self.base != NULL or not size or size % PAGE:
            raise ValueError(f"a window of {size} bytes")
        base = c_mmap(NULL, size, PROT_READ, flags, -1, 0)
        if base == MAP_FAILED:
            raise OSError(errno, "a window")
        self.base, self.size = <uint8_t *>base, size

    def __dealloc__(self):
        self.close()

    @property
    def hva(self):
        """Where it is in this process."""
        return <uint64_t>self.base

    def map(self, int fd, uint64_t at, uint64_t offset, uint64_t length, bint writable):
        """Show bytes of file ``fd`` from ``at`` on at ``offset``, instead of what was there. ``fd`` stays the caller's."""
        cdef int access = PROT_READ | PROT_WRITE if writable else PROT_READ
        self._check(offset, length)
        if at % PAGE or at >> 63 or at + length >> 63:
            raise OSError(EINVAL, "a place that no file has")
        self._replace(offset, length, access, MAP_SHARED | MAP_FIXED, fd, at)

    def unmap(self, uint64_t offset, uint64_t length):
        """Show nothing there any more."""
        self._check(offset, length)
        self._replace(offset, length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0)

    def clear(self):
        """Show nothing at all."""
        if self.base != NULL:
            self.unmap(0, self.size)

    cpdef void close(self):
        """Give the memory back; closing twice is harmless."""
        if self.base != NULL:
            munmap(self.base, self.size)
            self.base = NULL

    cdef int _check(self, uint64_t offset, uint64_t length) except -1:
        if self.base == NULL or not length or (offset | length) % PAGE:
            raise OSError(EINVAL, "not pages of a window")
        if offset > self.size or length > self.size - offset:
            raise OSError(EINVAL, "outside of the window")
        return 0

    cdef int _replace(
        self, uint64_t offset, uint64_t length, int access, int flags, int fd, int64_t at
    ) except -1:
        if c_mmap(self.base + offset, length, access, flags, fd, at) == MAP_FAILED:
            raise OSError(errno, "a mapping")
        return 0

"""What a disk image of any format can do: the face that virtio-blk works against.

Reads and writes whose bytes lie in a file as they are go there directly and asynchronously (``map``); all
else a format does itself, synchronously (``read``, ``write``). Nothing here takes the GIL.
"""

import os

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport uint64_t

from pileus._posix cimport iovec


cdef class Image:
    """A disk image. Owns its descriptors; ``close`` gives them back, locks included, after a last flush."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    cdef int map(self, uint64_t offset, uint64_t length, bint write, Extent *extent) noexcept nogil:
        extent.kind, extent.fd, extent.offset, extent.length = EXTENT_OTHER, -1, offset, length
        return 0

    cdef void release(self) noexcept nogil:
        pass

    cdef int read(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        return -EOPNOTSUPP

    cdef int write(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        return -EOPNOTSUPP

    cdef int flush(self) noexcept nogil:
        return -EOPNOTSUPP

    cdef int discard(self, uint64_t offset, uint64_t length) noexcept nogil:
        return -EOPNOTSUPP

    cdef int write_zeroes(self, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
        return -EOPNOTSUPP

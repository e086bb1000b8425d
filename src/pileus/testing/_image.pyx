"""A disk image driven as a device does it: in place where the image says so, by the image itself elsewhere."""

import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from pileus._posix cimport iovec
from pileus.block._image cimport EXTENT_DATA, EXTENT_OTHER, EXTENT_ZERO, Extent, Image


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **place, size_t align, size_t size)


cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, long offset)
    ssize_t pwrite(int fd, const void *data, size_t length, long offset)


KINDS = {EXTENT_DATA: "data", EXTENT_ZERO: "zero", EXTENT_OTHER: "other"}


cdef class ImageDriver:
    """Reads and writes ``image``, from any number of threads. All methods raise OSError.

    ``by_image``: always by the image itself, as a device without asynchronous I/O might.
    """

    cdef readonly Image image
    cdef bint _by_image

    def __init__(self, Image image not None, bint by_image=False):
        self.image, self._by_image = image, by_image

    def read(self, uint64_t offset, uint64_t length):
        """``length`` bytes."""
        cdef int rc
        cdef bytes result = PyBytes_FromStringAndSize(NULL, length)
        cdef char *place = result
        cdef _Buffer aligned = _Buffer(length) if self.image.direct else None
        cdef uint8_t *data = <uint8_t *>place if aligned is None else aligned.data
        with nogil:
            rc = self._move(data, length, offset, False)
        _check(rc)
        if aligned is not None:
            memcpy(place, data, length)
        return result

    def write(self, uint64_t offset, bytes data not None):
        cdef int rc
        cdef uint64_t length = len(data)
        cdef const char *place = data
        cdef _Buffer aligned = _Buffer(length) if self.image.direct else None
        if aligned is not None:
            memcpy(aligned.data, place, length)
            place = <const char *>aligned.data
        with nogil:
            rc = self._move(<uint8_t *>place, length, offset, True)
        _check(rc)

    def flush(self):
        cdef int rc
        with nogil:
            rc = self.image.flush()
        _check(rc)

    def discard(self, uint64_t offset, uint64_t length):
        cdef int rc
        with nogil:
            rc = self.image.discard(offset, length)
        _check(rc)

    def write_zeroes(self, uint64_t offset, uint64_t length, bint unmap=True):
        cdef int rc
        with nogil:
            rc = self.image.write_zeroes(offset, length, unmap)
        _check(rc)

    def extents(self, uint64_t offset, uint64_t length, bint write=False):
        """(kind, length, offset in its file) of each piece, the kind being "data", "zero" or "other"."""
        cdef Extent extent
        cdef int rc
        found = []
        while length:
            rc = self.image.map(offset, length, write, &extent)
            _check(rc)
            self.image.release()
            found.append((KINDS[extent.kind], extent.length, extent.offset))
            offset += extent.length
            length -= extent.length
        return found

    def hold(self, uint64_t offset, uint64_t length, bint write=False):
        """Map without releasing: the extent, as in ``extents``."""
        cdef Extent extent
        _check(self.image.map(offset, length, write, &extent))
        return KINDS[extent.kind], extent.length, extent.offset

    def let_go(self):
        """End one ``hold``."""
        self.image.release()

    cdef int _move(self, uint8_t *data, uint64_t length, uint64_t offset, bint write) noexcept nogil:
        cdef Extent extent
        cdef iovec[2] halves  # requests come in pieces
        cdef int rc
        extent.kind = EXTENT_OTHER
        while length:
            extent.length = length
            if not self._by_image:
                rc = self.image.map(offset, length, write, &extent)
                if rc < 0:
                    return rc
                if not 0 < extent.length <= length:
                    return -EIO
            if extent.kind == EXTENT_DATA:
                rc = _move_in_place(data, &extent, write)
            elif extent.kind == EXTENT_ZERO and not write:
                memset(data, 0, extent.length)
                rc = 0
            else:
                halves[0].iov_base, halves[0].iov_len = data, extent.length // 2
                halves[1].iov_base, halves[1].iov_len = data + extent.length // 2, extent.length - extent.length // 2
                if write:
                    rc = self.image.write(halves, 2, offset)
                else:
                    rc = self.image.read(halves, 2, offset)
            if not self._by_image:
                self.image.release()
            if rc < 0:
                return rc
            data += extent.length
            offset += extent.length
            length -= extent.length
        return 0


cdef int _move_in_place(uint8_t *data, Extent *extent, bint write) noexcept nogil:
    cdef uint64_t done = 0
    cdef ssize_t moved
    while done < extent.length:
        if write:
            moved = pwrite(extent.fd, data + done, extent.length - done, <long>(extent.offset + done))
        else:
            moved = pread(extent.fd, data + done, extent.length - done, <long>(extent.offset + done))
        if moved <= 0:
            return -EIO
        done += moved
    return 0


cdef class _Buffer:
    """Memory aligned to a page, as O_DIRECT wants it."""

    cdef uint8_t *data

    def __cinit__(self, uint64_t length):
        if posix_memalign(<void **>&self.data, 4096, max(length, <uint64_t>1)):
            self.data = NULL
            raise MemoryError

    def __dealloc__(self):
        free(self.data)


cdef class RawReader(Image):
    """A raw file read plainly: what stands behind an image in a test. ``fd`` becomes its own."""

    def __init__(self, int fd, str path):
        self.fd, self.path, self.format, self.readonly, self.direct = fd, path, "raw", True, False
        self.size = os.fstat(fd).st_size // 512 * 512
        self.logical_block = self.physical_block = 512
        self.can_discard = False

    cdef int map(self, uint64_t offset, uint64_t length, bint write, Extent *extent) noexcept nogil:
        extent.kind, extent.fd, extent.offset, extent.length = EXTENT_DATA, self.fd, offset, length
        return 0

    cdef int read(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        cdef Extent extent
        cdef int index, rc
        for index in range(count):
            extent.fd, extent.offset, extent.length = self.fd, offset, vectors[index].iov_len
            rc = _move_in_place(<uint8_t *>vectors[index].iov_base, &extent, False)
            if rc < 0:
                return rc
            offset += vectors[index].iov_len
        return 0


def _check(int rc):
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))

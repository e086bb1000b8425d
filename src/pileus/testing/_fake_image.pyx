"""A disk image that tells what was asked of it, fails when told to, and lets its callers wait."""

import os

from libc.stdint cimport uint64_t

from pileus._posix cimport iovec
from pileus.block._image cimport EXTENT_DATA, EXTENT_OTHER, EXTENT_ZERO, Extent, Image
from pileus.block._transfer cimport Cursor, cursor_start, transfer_readv, transfer_writev, transfer_zeroes


cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *data, size_t length)


cdef class FakeImage(Image):
    """``size`` bytes in memory, zero at first. ``kinds`` goes round, a letter for every ``piece`` bytes: d(ata),
    o(ther), or z(ero), which reads as zeroes whatever is written there.

    ``events`` are ("read", offset, length) and the like, of what came by a method of the image; data extents
    are not seen. ``errors`` maps such words to errnos. ``held`` counts extents mapped and not released.
    ``gated``: what would be an event waits for ``open_gate``, which lets everything through from then on.
    """

    cdef public list events
    cdef public dict errors
    cdef readonly int held
    cdef readonly int waited    # at the gate, since the start
    cdef bytes kinds
    cdef uint64_t piece
    cdef int gate
    cdef bint gated

    def __init__(self, uint64_t size, str kinds="d", *, uint64_t piece=4096, bint readonly=False, bint gated=False):
        self.path, self.format, self.readonly, self.direct = "fake", "fake", readonly, False
        self.size, self.logical_block, self.physical_block, self.can_discard = size, 512, 4096, True
        self.kinds, self.piece = kinds.encode(), piece
        self.events, self.errors = [], {}
        self.fd = os.memfd_create("fake", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.gated = gated
        self.gate = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    def close(self):
        super().close()
        if self.gate >= 0:
            os.close(self.gate)
            self.gate = -1

    def open_gate(self):
        self.gated = False
        os.eventfd_write(self.gate, 1 << 20)

    @property
    def content(self):
        return os.pread(self.fd, self.size, 0)

    @content.setter
    def content(self, data):
        os.pwrite(self.fd, data, 0)

    cdef int _event(self, const char *what, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t count
        if self.gated:
            self.waited += 1
            read(self.gate, &count, sizeof(count))
        with gil:
            word = what.decode()
            self.events.append((word, offset, length))
            return -self.errors.get(word, 0)

    cdef int map(self, uint64_t offset, uint64_t length, bint write, Extent *extent) noexcept nogil:
        cdef char kind
        cdef int rc
        with gil:
            rc = -self.errors.get("map", 0)
            kind = self.kinds[offset // self.piece % len(self.kinds)]
        if rc < 0:
            return rc
        extent.kind = EXTENT_DATA if kind == c"d" else EXTENT_OTHER
        if kind == c"z" and not write:
            extent.kind = EXTENT_ZERO
        extent.fd, extent.offset = self.fd, offset
        extent.length = min(length, self.piece - offset % self.piece)
        self.held += 1
        return 0

    cdef void release(self) noexcept nogil:
        self.held -= 1

    cdef int read(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        cdef Cursor cursor
        cdef uint64_t length = _length(vectors, count)
        cdef int rc = self._event(b"read", offset, length)
        cursor_start(&cursor, vectors, count)
        return rc if rc < 0 else transfer_readv(self.fd, 1, &cursor, length, offset)

    cdef int write(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        cdef Cursor cursor
        cdef uint64_t length = _length(vectors, count)
        cdef int rc = self._event(b"write", offset, length)
        cursor_start(&cursor, vectors, count)
        return rc if rc < 0 else transfer_writev(self.fd, 1, &cursor, length, offset)

    cdef int flush(self) noexcept nogil:
        return self._event(b"flush", 0, 0)

    cdef int discard(self, uint64_t offset, uint64_t length) noexcept nogil:
        return self._event(b"discard", offset, length)

    cdef int write_zeroes(self, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
        cdef int rc = self._event(b"unmap" if unmap else b"zero", offset, length)
        return rc if rc < 0 else transfer_zeroes(self.fd, 1, length, offset)


cdef uint64_t _length(const iovec *vectors, int count) noexcept nogil:
    cdef uint64_t length = 0
    cdef int index
    for index in range(count):
        length += vectors[index].iov_len
    return length

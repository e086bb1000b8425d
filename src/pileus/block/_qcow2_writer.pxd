from libc.stdint cimport uint64_t

from pileus.block._qcow2 cimport Qcow2Image
from pileus.block._qcow2_refcounts cimport Refcounts
from pileus.block._slice_cache cimport Slot
from pileus.block._transfer cimport Cursor


cdef class Qcow2Writer(Qcow2Image):
    cdef readonly Refcounts refcounts           # under _writer
    cdef bint _extensible

    cdef int _write(self, Cursor *cursor, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _write_zeroes(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _unmap(self, uint64_t offset, uint64_t length, bint zero, bint unmap) noexcept nogil

    # With _writer held:
    cdef int _writable(self) noexcept nogil
    cdef int _allocate(self, Cursor *cursor, uint64_t offset, uint64_t length, uint64_t *done) noexcept nogil
    cdef int _fill(self, uint64_t offset, uint64_t length, uint64_t host, bint fresh) noexcept nogil
    cdef int _find(self, uint64_t cluster, Slot **slot) noexcept nogil
    cdef int _own_table(self, uint64_t cluster) noexcept nogil
    cdef int _replace(self, uint64_t cluster, uint64_t entry) noexcept nogil
    cdef int _clear(self, uint64_t cluster, bint zero, bint unmap) noexcept nogil
    cdef int _free_old(self) noexcept nogil

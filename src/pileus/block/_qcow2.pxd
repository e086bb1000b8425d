from libc.stdint cimport uint32_t, uint64_t

from pileus._posix cimport iovec, pthread_mutex_t
from pileus.block._image cimport Image
from pileus.block._cluster_set cimport ClusterSet
from pileus.block._qcow2_compressed cimport Compressed
from pileus.block._qcow2_frees cimport Frees
from pileus.block._qcow2_mapping cimport Mapping
from pileus.block._transfer cimport Cursor


cdef enum Kind:
    STORED          # its bytes are in the file at ``host``, and it may be read or (asked for writing) written there
    ZEROES          # reads as zeroes
    PACKED          # a compressed cluster: ``entry``
    BEHIND          # in the backing file
    TO_ALLOCATE     # asked for writing: not this image's alone, or not there yet


cdef struct Place:
    Kind kind
    uint64_t host       # in the file, in bytes
    uint64_t entry      # of L2, of the first cluster
    uint64_t length     # bytes that are of this kind, and in a row in the file


cdef class Qcow2Image(Image):
    # Lock order: _writer, then _lock. Who holds _writer may change tables; who holds _lock may look at them.
    # An entry changes under both. Data moves under neither, except into clusters that are new.
    cdef readonly Image backing
    cdef readonly uint32_t version, cluster_bits
    cdef readonly uint32_t align
    cdef pthread_mutex_t _lock, _writer
    cdef Mapping _mapping
    cdef Compressed _compressed
    cdef Frees _frees                           # under _lock
    cdef ClusterSet _protected                  # where data must not be written; None if none is
    cdef uint64_t _users                        # extents that are out; under _lock
    cdef uint64_t _end                          # of the file, at least
    cdef int _failed                            # -errno of a write to the tables that may be half there

    cdef int _locate(self, uint64_t offset, uint64_t length, bint write, bint writer, Place *place) noexcept nogil
    cdef int _place(self, uint64_t offset, uint64_t length, bint write, Place *place) noexcept nogil
    cdef int _end_of_use(self, int rc) noexcept nogil
    cdef int _read_place(self, Cursor *cursor, uint64_t offset, Place *place) noexcept nogil
    cdef int _read(self, Cursor *cursor, uint64_t offset, uint64_t length) noexcept nogil
    cdef uint64_t _backed(self) noexcept nogil
    # Write dirty tables back, with _writer; ``stable``: and all there is to stable storage.
    cdef int _commit(self, bint stable) noexcept nogil


cdef uint64_t total_length(const iovec *vectors, int count) noexcept nogil
cdef int classify(Qcow2Image image, uint64_t entry, bint own, bint write, Place *place) noexcept nogil

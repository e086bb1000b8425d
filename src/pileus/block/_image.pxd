from libc.stdint cimport uint32_t, uint64_t

from pileus._posix cimport iovec


cdef enum:
    EXTENT_DATA = 0     # bytes of ``fd`` at ``offset``: read or write them there
    EXTENT_ZERO = 1     # reads as zeroes; of a read only
    EXTENT_OTHER = 2    # compressed, in a backing file, not allocated …: only ``read`` or ``write`` will do


cdef struct Extent:
    int kind
    int fd
    uint64_t offset     # in fd, in bytes
    uint64_t length     # how much of what was asked for is of this one kind and place, at least 1


cdef class Image:
    # A disk image of any format. Several threads call the nogil methods at once; each returns 0 or -errno.
    # Offsets and lengths are in bytes of the virtual disk; the caller keeps them within ``size``.
    cdef readonly str path
    cdef readonly str format            # raw, qcow2, ...
    cdef readonly int fd                # of the file itself
    cdef readonly bint readonly
    cdef readonly bint direct           # opened O_DIRECT: buffers, offsets and lengths of EXTENT_DATA must be aligned
    cdef readonly uint64_t size         # of the virtual disk, a multiple of 512
    cdef readonly uint32_t logical_block    # bytes, 512 or more
    cdef readonly uint32_t physical_block
    cdef readonly bint can_discard
    # Nothing but bytes of ``fd`` at the same offsets, flushed by fdatasync: no need to ask ``map`` …
    cdef readonly bint plain
    cdef readonly uint64_t guarded      # … but for writes below this offset, which only ``write`` may do

    # Where [offset, offset + length) is, as far as one extent goes. An extent stays good until ``release``:
    # what it points at is given to nobody else in between. One release for each map that returned 0.
    cdef int map(self, uint64_t offset, uint64_t length, bint write, Extent *extent) noexcept nogil
    cdef void release(self) noexcept nogil

    # All of it or -errno, synchronously; vectors may be of any alignment. ``write`` allocates.
    cdef int read(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil
    cdef int write(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil

    # What was written before is on stable storage, the format's own tables included.
    cdef int flush(self) noexcept nogil
    # The content is no longer needed: afterwards it reads as zeroes or as before. Space goes back where it can.
    cdef int discard(self, uint64_t offset, uint64_t length) noexcept nogil
    # Reads as zeroes afterwards; ``unmap`` allows the space to go back.
    cdef int write_zeroes(self, uint64_t offset, uint64_t length, bint unmap) noexcept nogil

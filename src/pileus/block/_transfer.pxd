from libc.stdint cimport uint32_t, uint64_t

from pileus._posix cimport iovec


cdef struct Cursor:
    # How far a request's vectors are used up.
    const iovec *vectors
    int count
    size_t done     # bytes of vectors[0]


# What moves advances the cursor. Vectors hold what is asked of them: the caller sums up their lengths.
cdef void cursor_start(Cursor *cursor, const iovec *vectors, int count) noexcept nogil
cdef int cursor_take(Cursor *cursor, size_t length, iovec *vectors, int most, size_t *taken) noexcept nogil
cdef void cursor_skip(Cursor *cursor, size_t length) noexcept nogil
cdef void cursor_zero(Cursor *cursor, size_t length) noexcept nogil
cdef void cursor_fill(Cursor *cursor, const void *data, size_t length) noexcept nogil
cdef void cursor_drain(Cursor *cursor, void *data, size_t length) noexcept nogil

# All of it or -errno. ``align`` is 1, or the blocks in bytes that an O_DIRECT descriptor asks for.
# What lies behind the end of a file reads as zeroes.
cdef int transfer_readv(int fd, uint32_t align, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil
cdef int transfer_writev(int fd, uint32_t align, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil
cdef int transfer_read(int fd, uint32_t align, void *data, size_t length, uint64_t offset) noexcept nogil
cdef int transfer_write(int fd, uint32_t align, const void *data, size_t length, uint64_t offset) noexcept nogil
cdef int transfer_zeroes(int fd, uint32_t align, size_t length, uint64_t offset) noexcept nogil

# Zeroes to write; how many bytes of ``length``.
cdef size_t zero_vector(iovec *vector, uint64_t length) noexcept nogil

cdef int file_sync(int fd) noexcept nogil                  # fdatasync
cdef uint64_t file_end(int fd) noexcept nogil              # bytes; 0 where there is no saying
cdef void file_punch(int fd, uint64_t offset, uint64_t length) noexcept nogil  # a favour: may do nothing

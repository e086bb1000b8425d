from libc.stdint cimport int64_t, uint8_t, uint64_t


cdef class FileWindow:
    cdef uint8_t *base
    cdef readonly uint64_t size

    cpdef void close(self)
    cdef int _check(self, uint64_t offset, uint64_t length) except -1
    cdef int _replace(
        self, uint64_t offset, uint64_t length, int access, int flags, int fd, int64_t at
    ) except -1

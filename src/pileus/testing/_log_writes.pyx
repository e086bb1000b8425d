"""Loaded before libc, by LD_PRELOAD: appends what is written to one file, and each barrier, to a log.

PILEUS_LOG_TARGET names the file, PILEUS_LOG the log. A record is a kind (W write, T truncate, P punch a hole,
S sync), an offset and a length as native 64-bit integers, and for W the data.

Nothing here is for Python, and no Python object may be touched: the loader binds other modules to these
functions before there is an interpreter. Its own symbols come from the python executable, or its libpython.
Modules built with Python's headers call the functions of large files, so these are all there are.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport abort, getenv
from posix.fcntl cimport O_APPEND, O_CREAT, O_WRONLY, open
from posix.stat cimport fstat, stat, struct_stat

from pileus._posix cimport iovec


cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, const iovec *vectors, int count)


cdef extern from "<sys/syscall.h>" nogil:
    long SYS_pwrite64, SYS_pwritev, SYS_ftruncate, SYS_fallocate, SYS_fdatasync


cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)


cdef enum:
    MAX_VECTORS = 1024      # IOV_MAX


cdef int log_fd     # 0: not open. The module's body, which would set another value, never runs


cdef bint is_target(int fd) noexcept nogil:
    cdef struct_stat it, target
    cdef const char *path = getenv("PILEUS_LOG_TARGET")
    return (
        path != NULL and fstat(fd, &it) == 0 and stat(path, &target) == 0
        and it.st_ino == target.st_ino and it.st_dev == target.st_dev
    )


cdef void record(char kind, uint64_t offset, uint64_t length, const iovec *data, int count) noexcept nogil:
    global log_fd
    cdef uint64_t[3] head
    cdef iovec[1 + MAX_VECTORS] all
    cdef uint64_t size = sizeof(head)
    cdef int index
    if log_fd == 0:
        log_fd = open(getenv("PILEUS_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0o600)
    head[0], head[1], head[2] = kind, offset, length
    all[0].iov_base, all[0].iov_len = head, sizeof(head)
    if count >= MAX_VECTORS:    # with the head these are too many for one call, which keeps a record whole
        abort()
    for index in range(count):
        all[1 + index] = data[index]
        size += data[index].iov_len
    if writev(log_fd, all, count + 1) != <ssize_t>size:
        abort()


cdef public ssize_t pwrite64(int fd, const void *data, size_t length, long offset) noexcept nogil:
    cdef iovec one
    one.iov_base, one.iov_len = <void *>data, length
    if is_target(fd):
        record(b"W", offset, length, &one, 1)
    return syscall(SYS_pwrite64, fd, data, length, offset)


cdef public ssize_t pwritev64(int fd, const iovec *vectors, int count, long offset) noexcept nogil:
    cdef uint64_t length = 0
    cdef int index
    for index in range(count):
        length += vectors[index].iov_len
    if is_target(fd):
        record(b"W", offset, length, vectors, count)
    return syscall(SYS_pwritev, fd, vectors, <long>count, offset, <long>0)


cdef public int ftruncate64(int fd, long size) noexcept nogil:
    if is_target(fd):
        record(b"T", 0, size, NULL, 0)
    return <int>syscall(SYS_ftruncate, fd, size)


cdef public int fallocate64(int fd, int mode, long offset, long length) noexcept nogil:
    if is_target(fd):
        record(b"P", offset, length, NULL, 0)
    return <int>syscall(SYS_fallocate, fd, mode, offset, length)


cdef public int fdatasync(int fd) noexcept nogil:
    cdef int result = <int>syscall(SYS_fdatasync, fd)
    if is_target(fd):
        record(b"S", 0, 0, NULL, 0)
    return result

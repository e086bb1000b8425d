"""System calls that Python's ``os`` has not, or not so: directories from a place on, renames with flags.

Each raises OSError, and lets other threads run meanwhile.

Source: getdents64(2), renameat2(2), fallocate(2), syncfs(2)
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t


cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdio.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    """
    int c_renameat2 "renameat2"(int, const char *, int, const char *, unsigned int) nogil
    int c_fallocate "fallocate"(int, int, int64_t, int64_t) nogil
    int c_syncfs "syncfs"(int) nogil
    int64_t lseek(int, int64_t, int) nogil
    long syscall(long, ...) nogil
    long SYS_getdents64
    int SEEK_SET


cdef enum:
    BLOCK = 32768


cdef packed struct Entry:   # struct linux_dirent64; the name follows
    uint64_t number
    int64_t offset
    uint16_t length
    uint8_t type


cdef object _failed(int number):
    return OSError(number, "")


def read_entries(int fd, int64_t offset):
    """A block of entries of the open directory from ``offset`` on: (name, inode number, next offset, type) each.

    An empty list at its end. Offsets are the file system's: only 0 and those it told mean anything.
    """
    cdef uint8_t[BLOCK] block
    cdef long got
    cdef int number
    cdef size_t at = 0
    cdef Entry *entry
    cdef const char *name
    with nogil:
        got = -1 if lseek(fd, offset, SEEK_SET) < 0 else syscall(SYS_getdents64, fd, &block[0], BLOCK)
        number = errno
    if got < 0:
        raise _failed(number)
    found = []
    while at < <size_t>got:
        entry = <Entry *>&block[at]
        name = <const char *>&block[at] + sizeof(Entry)
        found.append((<bytes>name, entry.number, entry.offset, entry.type))
        at += entry.length
    return found


def rename(int source, bytes name not None, int target, bytes new_name not None, unsigned int flags):
    """From directory ``source`` to directory ``target``, with RENAME_ flags."""
    cdef const char *old = name
    cdef const char *new = new_name
    cdef int failed, number
    with nogil:
        failed = c_renameat2(source, old, target, new, flags)
        number = errno
    if failed:
        raise _failed(number)


def fallocate(int fd, int mode, int64_t offset, int64_t length):
    """Allocate, punch or zero a range of an open file."""
    cdef int failed, number
    with nogil:
        failed = c_fallocate(fd, mode, offset, length)
        number = errno
    if failed:
        raise _failed(number)


def syncfs(int fd):
    """Write back the whole file system that ``fd`` is on."""
    cdef int failed, number
    with nogil:
        failed = c_syncfs(fd)
        number = errno
    if failed:
        raise _failed(number)

"""Bytes between memory and a file: all of them or an error, in aligned pieces where O_DIRECT asks for those.

An unaligned write through O_DIRECT reads and writes back what stands around it. So its caller sees to it
that nobody else writes in the same block at the same time.
"""

import os

from libc.errno cimport EFBIG, EINTR, EIO, ENOMEM, errno
from libc.stdint cimport INT64_MAX, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from pileus._posix cimport iovec


cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *vectors, int count, long offset)
    ssize_t pwritev(int fd, const iovec *vectors, int count, long offset)


cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, long offset)
    ssize_t pwrite(int fd, const void *data, size_t length, long offset)
    int fdatasync(int fd)
    long lseek(int fd, long offset, int whence)
    int SEEK_END


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **place, size_t align, size_t size)


cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE


cdef enum:
    VECTORS = 64            # of one system call
    BOUNCE = 256 << 10      # bytes of an aligned buffer
    PAGE = 4096
    ZEROES = 64 << 10

cdef uint8_t[65536] zeroes  # never written


cdef void cursor_start(Cursor *cursor, const iovec *vectors, int count) noexcept nogil:
    cursor.vectors, cursor.count, cursor.done = vectors, count, 0


cdef int cursor_take(Cursor *cursor, size_t length, iovec *vectors, int most, size_t *taken) noexcept nogil:
    """Describe the next up to ``length`` bytes in at most ``most`` vectors, and return how many it took.

    Does not advance.
    """
    cdef int index = 0, count = 0
    cdef size_t skip = cursor.done, room
    taken[0] = 0
    while count < most and index < cursor.count and taken[0] < length:
        room = min(cursor.vectors[index].iov_len - skip, length - taken[0])
        if room:
            vectors[count].iov_base = <uint8_t *>cursor.vectors[index].iov_base + skip
            vectors[count].iov_len = room
            taken[0] += room
            count += 1
        index += 1
        skip = 0
    return count


cdef size_t _advance(Cursor *cursor, size_t length) noexcept nogil:
    """Step over up to ``length`` bytes of one vector; 0 at the end."""
    cdef size_t room
    while cursor.count and cursor.done == cursor.vectors[0].iov_len:
        cursor.vectors += 1
        cursor.count -= 1
        cursor.done = 0
    if not cursor.count:
        return 0
    room = min(cursor.vectors[0].iov_len - cursor.done, length)
    cursor.done += room
    return room


cdef void cursor_skip(Cursor *cursor, size_t length) noexcept nogil:
    cdef size_t step = 1
    while length and step:
        step = _advance(cursor, length)
        length -= step


cdef void cursor_zero(Cursor *cursor, size_t length) noexcept nogil:
    cdef size_t step = 1
    while length and step:
        step = _advance(cursor, length)
        if step:
            memset(<uint8_t *>cursor.vectors[0].iov_base + cursor.done - step, 0, step)
        length -= step


cdef void cursor_fill(Cursor *cursor, const void *data, size_t length) noexcept nogil:
    """Copy ``data`` into the vectors."""
    cdef const uint8_t *source = <const uint8_t *>data
    cdef size_t step = 1
    while length and step:
        step = _advance(cursor, length)
        if step:
            memcpy(<uint8_t *>cursor.vectors[0].iov_base + cursor.done - step, source, step)
        source += step
        length -= step


cdef void cursor_drain(Cursor *cursor, void *data, size_t length) noexcept nogil:
    """Copy what the vectors hold to ``data``."""
    cdef uint8_t *target = <uint8_t *>data
    cdef size_t step = 1
    while length and step:
        step = _advance(cursor, length)
        if step:
            memcpy(target, <uint8_t *>cursor.vectors[0].iov_base + cursor.done - step, step)
        target += step
        length -= step


cdef bint _aligned(uint32_t align, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
    cdef uint64_t all = offset
    cdef int index
    for index in range(count):
        all |= <uintptr_t>vectors[index].iov_base | vectors[index].iov_len
    return all & (align - 1) == 0


cdef int transfer_readv(int fd, uint32_t align, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil:
    cdef iovec[VECTORS] vectors
    cdef size_t taken
    cdef ssize_t got
    cdef int count, rc
    if offset > <uint64_t>INT64_MAX - length:
        return -EIO
    while length:
        count = cursor_take(cursor, length, vectors, VECTORS, &taken)
        if not count:
            return -EIO
        if align > 1 and not _aligned(align, vectors, count, offset):
            taken = min(taken, <size_t>BOUNCE // 2)
            rc = _bounced_read(fd, align, cursor, taken, offset)
            if rc < 0:
                return rc
            offset += taken
            length -= taken
            continue
        got = preadv(fd, vectors, count, <long>offset)
        if got < 0:
            if errno == EINTR:
                continue
            return -errno
        if got == 0:
            cursor_zero(cursor, length)
            return 0
        cursor_skip(cursor, got)
        offset += got
        length -= got
    return 0


cdef int transfer_writev(int fd, uint32_t align, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil:
    cdef iovec[VECTORS] vectors
    cdef size_t taken
    cdef ssize_t put
    cdef int count, rc
    if offset > <uint64_t>INT64_MAX - length:
        return -EFBIG
    while length:
        count = cursor_take(cursor, length, vectors, VECTORS, &taken)
        if not count:
            return -EIO
        if align > 1 and not _aligned(align, vectors, count, offset):
            taken = min(taken, <size_t>BOUNCE // 2)
            rc = _bounced_write(fd, align, cursor, taken, offset)
            if rc < 0:
                return rc
            offset += taken
            length -= taken
            continue
        put = pwritev(fd, vectors, count, <long>offset)
        if put < 0:
            if errno == EINTR:
                continue
            return -errno
        if put == 0:
            return -EIO
        cursor_skip(cursor, put)
        offset += put
        length -= put
    return 0


cdef int _span_read(int fd, uint8_t *data, size_t length, uint64_t offset) noexcept nogil:
    """An aligned read into an aligned buffer; zeroes behind the end of the file."""
    cdef size_t have = 0
    cdef ssize_t got
    while have < length:
        got = pread(fd, data + have, length - have, <long>(offset + have))
        if got < 0:
            if errno == EINTR:
                continue
            return -errno
        have += got
        if got == 0 or got & 511:  # the end of the file, or in its last block
            break
    memset(data + have, 0, length - have)
    return 0


cdef int _span_write(int fd, const uint8_t *data, size_t length, uint64_t offset) noexcept nogil:
    cdef size_t have = 0
    cdef ssize_t put
    while have < length:
        put = pwrite(fd, data + have, length - have, <long>(offset + have))
        if put < 0:
            if errno == EINTR:
                continue
            return -errno
        if put == 0:
            return -EIO
        have += put
    return 0


cdef int _bounced_read(int fd, uint32_t align, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t start = offset & ~<uint64_t>(align - 1)
    cdef size_t span = (offset + length - start + align - 1) & ~<size_t>(align - 1)
    cdef void *data
    cdef int rc
    if posix_memalign(&data, PAGE, span):
        return -ENOMEM
    rc = _span_read(fd, <uint8_t *>data, span, start)
    if rc == 0:
        cursor_fill(cursor, <uint8_t *>data + (offset - start), length)
    free(data)
    return rc


cdef int _bounced_write(int fd, uint32_t align, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t start = offset & ~<uint64_t>(align - 1)
    cdef size_t span = (offset + length - start + align - 1) & ~<size_t>(align - 1)
    cdef void *data
    cdef int rc = 0
    if posix_memalign(&data, PAGE, span):
        return -ENOMEM
    if start != offset:
        rc = _span_read(fd, <uint8_t *>data, align, start)
    if rc == 0 and offset + length != start + span and (span > align or start == offset):
        rc = _span_read(fd, <uint8_t *>data + span - align, align, start + span - align)
    if rc == 0:
        cursor_drain(cursor, <uint8_t *>data + (offset - start), length)
        rc = _span_write(fd, <uint8_t *>data, span, start)
    free(data)
    return rc


cdef int transfer_read(int fd, uint32_t align, void *data, size_t length, uint64_t offset) noexcept nogil:
    cdef iovec whole
    cdef Cursor cursor
    whole.iov_base, whole.iov_len = data, length
    cursor_start(&cursor, &whole, 1)
    return transfer_readv(fd, align, &cursor, length, offset)


cdef int transfer_write(int fd, uint32_t align, const void *data, size_t length, uint64_t offset) noexcept nogil:
    cdef iovec whole
    cdef Cursor cursor
    whole.iov_base, whole.iov_len = <void *>data, length
    cursor_start(&cursor, &whole, 1)
    return transfer_writev(fd, align, &cursor, length, offset)


cdef size_t zero_vector(iovec *vector, uint64_t length) noexcept nogil:
    vector.iov_base, vector.iov_len = zeroes, <size_t>min(length, <uint64_t>ZEROES)
    return vector.iov_len


cdef int transfer_zeroes(int fd, uint32_t align, size_t length, uint64_t offset) noexcept nogil:
    cdef iovec some
    cdef size_t step
    cdef int rc
    while length:
        step = zero_vector(&some, length)
        rc = transfer_write(fd, align, some.iov_base, step, offset)
        if rc < 0:
            return rc
        length -= step
        offset += step
    return 0


cdef int file_sync(int fd) noexcept nogil:
    return 0 if fdatasync(fd) == 0 else -errno


cdef uint64_t file_end(int fd) noexcept nogil:
    cdef long end = lseek(fd, 0, SEEK_END)
    return end if end > 0 else 0


cdef void file_punch(int fd, uint64_t offset, uint64_t length) noexcept nogil:
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long>offset, <long>length)


def read_bytes(int fd, uint32_t align, uint64_t offset, size_t length):
    """``length`` bytes of ``fd``, with zeroes behind its end. Raises OSError."""
    cdef bytearray data = bytearray(length)
    cdef char *place = data
    cdef int rc
    with nogil:
        rc = transfer_read(fd, align, place, length, offset)
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return bytes(data)


def write_bytes(int fd, uint32_t align, uint64_t offset, bytes data):
    """Write ``data``. Raises OSError."""
    cdef const char *place = data
    cdef size_t length = len(data)
    cdef int rc
    with nogil:
        rc = transfer_write(fd, align, place, length, offset)
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))


def direct_alignment(int fd):
    """The blocks in bytes, 512 or 4096, that reads of an O_DIRECT ``fd`` have to keep to."""
    import mmap

    page = mmap.mmap(-1, PAGE)
    view = memoryview(page)
    try:
        os.preadv(fd, [view[:512]], 512)
    except OSError:
        return PAGE
    finally:
        view.release()
        page.close()
    return 512

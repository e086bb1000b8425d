"""A raw image: a file or a block device that is the disk, byte for byte."""

import os
import stat

from libc.errno cimport EINTR, EINVAL, EIO, ENOTTY, EOPNOTSUPP, EPERM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp

from pileus._posix cimport (
    iovec,
    pthread_mutex_t,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from pileus.block._image cimport EXTENT_DATA, EXTENT_OTHER, Extent, Image
from pileus.block._transfer cimport (
    Cursor,
    cursor_drain,
    cursor_skip,
    cursor_start,
    cursor_take,
    file_end,
    file_sync,
    transfer_readv,
    transfer_write,
    transfer_writev,
    transfer_zeroes,
)

from pileus import log
from pileus.block._transfer import direct_alignment


cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *vectors, int count, long offset)


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void *argument)


cdef extern from "<linux/fs.h>":
    unsigned long BLKSSZGET, BLKPBSZGET, BLKGETSIZE64, BLKROGET, BLKDISCARD, BLKZEROOUT


cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE


cdef enum:
    SECTOR = 512
    PAGE = 4096
    VECTORS = 64
    MAGIC_SIZE = 4

cdef const char *magic = b"QFI\xfb"
QCOW2_MAGIC = magic[:MAGIC_SIZE]


cdef class RawImage(Image):
    """The disk in ``fd``, which it owns from here on; ``direct``: ``fd`` is O_DIRECT.

    ``probed``: nobody said that the image is raw, it only looks like that. The guest may then not write what
    would make it look like something else the next time, such as a QCOW2 that names any file as its backing.
    Raises OSError, and ValueError for what cannot be a disk.
    """

    cdef uint32_t align             # what O_DIRECT asks for, 1: nothing
    cdef bint block_device
    cdef pthread_mutex_t mutex      # of writes that read what stands around them

    def __cinit__(self, *_, **__):
        self.fd = -1
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    def __init__(self, int fd, str path, *, bint readonly, bint direct, bint probed):
        about = os.fstat(fd)
        self.path, self.format, self.readonly, self.direct = path, "raw", readonly, direct
        self.plain = True
        self.block_device = stat.S_ISBLK(about.st_mode)
        self.align = direct_alignment(fd) if direct else 1
        if self.block_device:
            self._ask_device(fd, about.st_rdev)
        elif stat.S_ISREG(about.st_mode):
            self.size = about.st_size // SECTOR * SECTOR
            if self.size != about.st_size:
                log.warning(f"{path}: the last {about.st_size - self.size} bytes make no whole sector; left out")
            self.logical_block = max(<uint32_t>SECTOR, self.align)
            self.physical_block = max(self.logical_block, <uint32_t>PAGE)
            self.can_discard = not readonly
        else:
            raise ValueError("it is neither a file nor a block device")
        self.guarded = max(<uint32_t>SECTOR, self.align) if probed and not readonly else 0
        self.fd = fd

    cdef _ask_device(self, int fd, rdev):
        cdef int logical = 0, protected = 0
        cdef unsigned int physical = 0
        cdef uint64_t size = 0
        if ioctl(fd, BLKSSZGET, &logical) < 0 or ioctl(fd, BLKPBSZGET, &physical) < 0:
            raise OSError(errno, os.strerror(errno))
        if ioctl(fd, BLKGETSIZE64, &size) < 0:
            raise OSError(errno, os.strerror(errno))
        if ioctl(fd, BLKROGET, &protected) == 0 and protected and not self.readonly:
            raise ValueError("the device can only be read: say readonly=on")
        self.size = size // SECTOR * SECTOR
        self.logical_block = max(<uint32_t>logical, <uint32_t>SECTOR)
        self.physical_block = max(self.logical_block, physical)
        self.can_discard = not self.readonly and _discards(rdev)

    cdef int map(self, uint64_t offset, uint64_t length, bint write, Extent *extent) noexcept nogil:
        extent.kind, extent.fd, extent.offset, extent.length = EXTENT_DATA, self.fd, offset, length
        if write and offset < self.guarded:
            extent.kind, extent.length = EXTENT_OTHER, min(length, self.guarded - offset)
        return 0

    cdef int read(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        """Past the end of a file that shrank nothing can be read."""
        cdef iovec[VECTORS] some
        cdef Cursor cursor
        cdef size_t left = _length(vectors, count), taken
        cdef ssize_t got
        cdef int several
        cursor_start(&cursor, vectors, count)
        if self.align > 1 and not _aligned(self.align, vectors, count, offset):
            if not self.block_device and offset + left > file_end(self.fd):
                return -EIO
            return transfer_readv(self.fd, self.align, &cursor, left, offset)
        while left:
            several = cursor_take(&cursor, left, some, VECTORS, &taken)
            got = preadv(self.fd, some, several, <long>offset)
            if got < 0:
                if errno == EINTR:
                    continue
                return -errno
            if got == 0:
                return -EIO
            cursor_skip(&cursor, got)
            offset += got
            left -= got
        return 0

    cdef int write(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        cdef Cursor cursor
        cdef size_t left = _length(vectors, count)
        cdef int rc
        cursor_start(&cursor, vectors, count)
        if offset < self.guarded and left:
            rc = self._write_guarded(&cursor, min(left, self.guarded - offset), offset)
            if rc < 0 or left <= self.guarded - offset:
                return rc
            left -= self.guarded - offset
            offset = self.guarded
        elif self.align == 1 or _aligned(self.align, vectors, count, offset):
            return transfer_writev(self.fd, self.align, &cursor, left, offset)
        pthread_mutex_lock(&self.mutex)
        rc = transfer_writev(self.fd, self.align, &cursor, left, offset)
        pthread_mutex_unlock(&self.mutex)
        return rc

    cdef int _write_guarded(self, Cursor *cursor, size_t length, uint64_t offset) noexcept nogil:
        """Judge a copy, which the guest cannot change any more."""
        cdef uint8_t[PAGE] copy
        cdef int rc
        cursor_drain(cursor, copy, length)
        if offset < MAGIC_SIZE and (offset or length < MAGIC_SIZE or memcmp(copy, magic, MAGIC_SIZE) == 0):
            return -EPERM
        pthread_mutex_lock(&self.mutex)
        rc = transfer_write(self.fd, self.align, copy, length, offset)
        pthread_mutex_unlock(&self.mutex)
        return rc

    cdef int flush(self) noexcept nogil:
        return file_sync(self.fd)

    cdef int discard(self, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t[2] range
        cdef int rc
        range[0], range[1] = offset, length
        if self.block_device:
            rc = ioctl(self.fd, BLKDISCARD, range)
        else:
            rc = fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long>offset, <long>length)
        return 0 if rc == 0 or errno == EOPNOTSUPP else -errno  # a hint: to leave it all as it is will do

    cdef int write_zeroes(self, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
        cdef uint64_t[2] range
        cdef int rc = -1
        range[0], range[1] = offset, length
        if self.block_device:
            rc = ioctl(self.fd, BLKZEROOUT, range)
        else:
            if unmap:
                rc = fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long>offset, <long>length)
            if rc < 0:
                rc = fallocate(self.fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, <long>offset, <long>length)
        if rc < 0 and errno in (EOPNOTSUPP, ENOTTY, EINVAL):
            return transfer_zeroes(self.fd, self.align, length, offset)
        return 0 if rc == 0 else -errno


cdef size_t _length(const iovec *vectors, int count) noexcept nogil:
    cdef size_t length = 0
    cdef int index
    for index in range(count):
        length += vectors[index].iov_len
    return length


cdef bint _aligned(uint32_t align, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
    cdef uint64_t all = offset
    cdef int index
    for index in range(count):
        all |= <uintptr_t>vectors[index].iov_base | vectors[index].iov_len
    return all & (align - 1) == 0


def _discards(rdev):
    """Whether the block device can discard; a partition tells by the disk that it is a part of."""
    folder = f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}"
    for queue in (f"{folder}/queue", f"{folder}/../queue"):
        try:
            with open(f"{queue}/discard_max_bytes", "rb") as limit:
                return int(limit.read()) > 0
        except OSError:
            pass
    return False

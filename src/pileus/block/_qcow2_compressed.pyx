"""Compressed clusters of a QCOW2 file: one at a time, by zlib or zstd, never more than a cluster of output.

Source: QEMU, docs/interop/qcow2.rst, "Compressed Clusters Descriptor"; RFC 1951 (no zlib header); RFC 8878.
"""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pileus._posix cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from pileus.block._transfer cimport Cursor, cursor_fill, transfer_read


cdef extern from "<zlib.h>" nogil:
    ctypedef struct z_stream:
        uint8_t *next_in
        unsigned int avail_in
        uint8_t *next_out
        unsigned int avail_out
    int inflateInit2(z_stream *, int window_bits)
    int inflate(z_stream *, int flush)
    int inflateEnd(z_stream *)
    int Z_OK, Z_FINISH


cdef extern from "<zstd.h>" nogil:
    size_t ZSTD_findFrameCompressedSize(const void *source, size_t size)
    size_t ZSTD_decompress(void *target, size_t room, const void *source, size_t size)
    unsigned int ZSTD_isError(size_t code)


cdef enum:
    RAW_DEFLATE = -15  # window bits; negative: no header


cdef class Compressed:
    def __cinit__(self, int fd, uint32_t align, uint32_t cluster_bits, bint zstd):
        self._fd, self._align, self._cluster_bits, self._zstd = fd, align, cluster_bits, zstd
        self._last, self._last_entry = NULL, 0
        pthread_mutex_init(&self._lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self._lock)
        free(self._last)

    cdef void span(self, uint64_t entry, uint64_t *offset, uint64_t *length) noexcept nogil:
        cdef uint32_t offset_bits = 62 - (self._cluster_bits - 8)
        cdef uint64_t sectors = ((entry & ((<uint64_t>1 << 62) - 1)) >> offset_bits) + 1
        offset[0] = entry & ((<uint64_t>1 << offset_bits) - 1)
        length[0] = sectors * 512 - (offset[0] & 511)

    cdef int read(self, uint64_t entry, size_t skip, size_t length, Cursor *cursor) noexcept nogil:
        cdef uint8_t *cluster
        cdef uint8_t *old
        cdef int rc
        pthread_mutex_lock(&self._lock)
        if self._last_entry == entry:
            cursor_fill(cursor, self._last + skip, length)
            pthread_mutex_unlock(&self._lock)
            return 0
        pthread_mutex_unlock(&self._lock)
        cluster = <uint8_t *>malloc(<size_t>1 << self._cluster_bits)
        if cluster == NULL:
            return -ENOMEM
        rc = self._unpack(entry, cluster)
        if rc < 0:
            free(cluster)
            return rc
        cursor_fill(cursor, cluster + skip, length)
        pthread_mutex_lock(&self._lock)
        old, self._last, self._last_entry = self._last, cluster, entry
        pthread_mutex_unlock(&self._lock)
        free(old)
        return 0

    cdef int _unpack(self, uint64_t entry, uint8_t *cluster) noexcept nogil:
        cdef uint64_t offset, length
        cdef uint8_t *packed
        cdef int rc
        self.span(entry, &offset, &length)
        if offset >> 56:
            return -EIO
        packed = <uint8_t *>malloc(length)  # at most two clusters
        if packed == NULL:
            return -ENOMEM
        rc = transfer_read(self._fd, self._align, packed, length, offset)
        if rc == 0:
            if self._zstd:
                rc = _unpack_zstd(packed, length, cluster, <size_t>1 << self._cluster_bits)
            else:
                rc = _inflate(packed, length, cluster, <size_t>1 << self._cluster_bits)
        free(packed)
        return rc


cdef int _inflate(const uint8_t *packed, size_t length, uint8_t *cluster, size_t size) noexcept nogil:
    cdef z_stream stream
    memset(&stream, 0, sizeof(stream))
    stream.next_in, stream.avail_in = <uint8_t *>packed, <unsigned int>length
    stream.next_out, stream.avail_out = cluster, <unsigned int>size
    if inflateInit2(&stream, RAW_DEFLATE) != Z_OK:
        return -ENOMEM
    inflate(&stream, Z_FINISH)  # what it says matters less than whether a whole cluster came out
    inflateEnd(&stream)
    return -EIO if stream.avail_out else 0


cdef int _unpack_zstd(const uint8_t *packed, size_t length, uint8_t *cluster, size_t size) noexcept nogil:
    """Frame by frame: behind the last there may be anything up to the end of its sector."""
    cdef size_t done = 0, taken = 0, frame, got
    while done < size:
        frame = ZSTD_findFrameCompressedSize(packed + taken, length - taken)
        if ZSTD_isError(frame) or frame == 0:
            return -EIO
        got = ZSTD_decompress(cluster + done, size - done, packed + taken, frame)
        if ZSTD_isError(got):
            return -EIO
        taken += frame
        done += got
    return 0

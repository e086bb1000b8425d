# cython: cdivision=True
"""A QCOW2 image: where the bytes of a virtual disk are in a file, and reading them.

What is in the file as it is, is read there (``map``), or in the backing file. Compressed clusters are
unpacked here. Writing is ``_qcow2_writer``'s.

Source: QEMU, docs/interop/qcow2.rst.
"""

import os

from libc.errno cimport EAGAIN, EIO, ENOMEM, EROFS
from libc.stdint cimport uint32_t, uint64_t

from pileus._posix cimport (
    iovec,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from pileus.block._big_endian cimport load_be64
from pileus.block._image cimport EXTENT_DATA, EXTENT_OTHER, EXTENT_ZERO, Extent, Image
from pileus.block._qcow2_compressed cimport Compressed
from pileus.block._qcow2_frees cimport Frees
from pileus.block._qcow2_mapping cimport COMPRESSED, COPIED, OFFSET_MASK, ZERO, Mapping
from pileus.block._slice_cache cimport Slot
from pileus.block._transfer cimport (
    Cursor,
    cursor_skip,
    cursor_start,
    cursor_take,
    cursor_zero,
    file_end,
    transfer_readv,
)


cdef enum:
    VECTORS = 64    # that a backing file is given at a time
    PAGE = 4096


cdef class Qcow2Image(Image):
    """What ``header`` and ``l1`` (its offset and count of entries) describe, for reading.

    Does not own ``fd`` if this raises: OSError, MemoryError, or ValueError saying what is wrong with the image.
    """

    def __cinit__(self, *_, **__):
        self.fd = -1
        self._frees = Frees()
        pthread_mutex_init(&self._lock, NULL)
        pthread_mutex_init(&self._writer, NULL)

    def __init__(self, int fd, str path, header, *, uint64_t size, tuple l1, bint direct, uint32_t align,
                 Image backing):
        cdef uint32_t bits = header.cluster_bits
        cdef uint64_t clusters = (size + (<uint64_t>1 << bits) - 1) >> bits
        self.path, self.format, self.readonly, self.direct, self.size = path, "qcow2", True, direct, size
        self.version, self.cluster_bits, self.align, self.backing = header.version, bits, align, backing
        self.logical_block = max(512, align)
        if backing is not None and backing.direct:
            self.logical_block = max(self.logical_block, backing.logical_block)
        self.physical_block = max(self.logical_block, min(1 << bits, PAGE))
        self.can_discard = False
        self._end = file_end(fd)
        self._compressed = Compressed(fd, align, bits, header.zstd)
        self._mapping = Mapping(fd, align, bits, l1[0], l1[1], clusters)
        self.fd = fd

    def __dealloc__(self):
        pthread_mutex_destroy(&self._writer)
        pthread_mutex_destroy(&self._lock)

    def close(self):
        """Close the file, and the backing file."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        if self.backing is not None:
            self.backing.close()

    cdef int flush(self) noexcept nogil:
        return 0

    cdef int write(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        return -EROFS

    cdef int write_zeroes(self, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
        return -EROFS

    cdef int discard(self, uint64_t offset, uint64_t length) noexcept nogil:
        return 0

    cdef int _commit(self, bint stable) noexcept nogil:
        return -ENOMEM  # nothing is dirty here: a slot was wanted, and there was no memory

    # Looking up

    cdef int map(self, uint64_t offset, uint64_t length, bint write, Extent *extent) noexcept nogil:
        cdef Place place
        cdef int rc
        if write and (self.readonly or self._failed):
            return -EROFS if self.readonly else self._failed
        rc = self._locate(offset, length, write, False, &place)
        if rc < 0:
            return rc
        extent.kind, extent.fd, extent.offset, extent.length = EXTENT_OTHER, -1, offset, place.length
        if place.kind == STORED:
            if place.host + place.length > self._end:
                self._end = max(self._end, file_end(self.fd))
            if write or place.host + place.length <= self._end:
                extent.kind, extent.fd, extent.offset = EXTENT_DATA, self.fd, place.host
        elif place.kind == ZEROES:
            extent.kind = EXTENT_ZERO
        elif place.kind == BEHIND and self.backing.direct == self.direct:
            # Nobody writes to a backing file, so its extents stay good without being counted.
            rc = self.backing.map(offset, place.length, False, extent)
            if rc < 0:
                return self._end_of_use(rc)
            self.backing.release()
        return 0

    cdef void release(self) noexcept nogil:
        self._end_of_use(0)

    cdef int _end_of_use(self, int rc) noexcept nogil:
        pthread_mutex_lock(&self._lock)
        self._users -= 1
        if self._users == 0:
            self._frees.all_quiet()
        pthread_mutex_unlock(&self._lock)
        return rc

    cdef int _locate(self, uint64_t offset, uint64_t length, bint write, bint writer, Place *place) noexcept nogil:
        """Where ``offset`` is, and one user more. ``writer``: the caller has that lock."""
        cdef bint taken = False
        cdef int rc, attempt
        for attempt in range(2):
            pthread_mutex_lock(&self._lock)
            rc = self._place(offset, length, write, place)
            if rc == 0:
                self._users += 1
            pthread_mutex_unlock(&self._lock)
            if rc != -EAGAIN:
                break
            if attempt:
                rc = -ENOMEM  # it was not that all slots are dirty
                break
            if not writer:
                pthread_mutex_lock(&self._writer)  # kept: nobody makes them dirty again before we had one
                taken = True
            rc = self._commit(False)
            if rc < 0:
                break
        if taken:
            pthread_mutex_unlock(&self._writer)
        return rc

    cdef int _place(self, uint64_t offset, uint64_t length, bint write, Place *place) noexcept nogil:
        cdef uint64_t cluster = offset >> self.cluster_bits, size = <uint64_t>1 << self.cluster_bits
        cdef uint64_t mask = (<uint64_t>1 << self._mapping.slice_entry_bits) - 1, index, run, step, backed
        cdef bint own = (self._mapping.l1_entry(cluster) & COPIED) != 0
        cdef Slot *slot
        cdef Place following
        cdef int rc = self._mapping.find(cluster, &slot)
        if rc < 0:
            return rc
        length = min(length, (((cluster | mask) + 1) << self.cluster_bits) - offset)
        place.kind, place.host, place.entry = (TO_ALLOCATE if write else BEHIND), 0, 0
        run = length
        if slot != NULL:
            index = cluster & mask
            rc = classify(self, load_be64(slot.data, index), own, write, place)
            if rc < 0:
                return rc
            run = size - (offset & (size - 1))
            if place.kind == PACKED or (place.kind == TO_ALLOCATE and place.host):
                length = min(length, run)
            while run < length:
                index += 1
                rc = classify(self, load_be64(slot.data, index), own, write, &following)
                if rc < 0 or following.kind != place.kind:
                    break
                step = (index - (cluster & mask)) << self.cluster_bits
                if place.kind == STORED and following.host != place.host + step:
                    break
                if place.kind == TO_ALLOCATE and following.host:
                    break
                run += size
        place.length = min(run, length)
        if place.kind == STORED:
            place.host += offset & (size - 1)
        if place.kind == BEHIND:
            backed = self._backed()
            if offset >= backed:
                place.kind = ZEROES
            else:
                place.length = min(place.length, backed - offset)
        return 0

    cdef uint64_t _backed(self) noexcept nogil:
        """How much of the disk the backing file covers, in bytes."""
        return 0 if self.backing is None else min(self.backing.size, self.size)

    # Reading

    cdef int read(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        cdef Cursor cursor
        cursor_start(&cursor, vectors, count)
        return self._read(&cursor, offset, total_length(vectors, count))

    cdef int _read(self, Cursor *cursor, uint64_t offset, uint64_t length) noexcept nogil:
        cdef Place place
        cdef int rc
        while length:
            rc = self._locate(offset, length, False, False, &place)
            if rc < 0:
                return rc
            rc = self._end_of_use(self._read_place(cursor, offset, &place))
            if rc < 0:
                return rc
            offset += place.length
            length -= place.length
        return 0

    cdef int _read_place(self, Cursor *cursor, uint64_t offset, Place *place) noexcept nogil:
        cdef iovec[VECTORS] vectors
        cdef uint64_t done = 0
        cdef size_t taken
        cdef int count, rc
        if place.kind == STORED:
            return transfer_readv(self.fd, self.align, cursor, place.length, place.host)
        if place.kind == PACKED:
            return self._compressed.read(
                place.entry, offset & ((<uint64_t>1 << self.cluster_bits) - 1), place.length, cursor
            )
        if place.kind == ZEROES:
            cursor_zero(cursor, place.length)
            return 0
        while done < place.length:
            count = cursor_take(cursor, place.length - done, vectors, VECTORS, &taken)
            if not count:
                return -EIO
            rc = self.backing.read(vectors, count, offset + done)
            if rc < 0:
                return rc
            cursor_skip(cursor, taken)
            done += taken
        return 0


cdef uint64_t total_length(const iovec *vectors, int count) noexcept nogil:
    cdef uint64_t length = 0
    cdef int index
    for index in range(count):
        length += vectors[index].iov_len
    return length


cdef int classify(Qcow2Image image, uint64_t entry, bint own, bint write, Place *place) noexcept nogil:
    """What an L2 entry says; -EIO for what it cannot. ``own``: its table is no snapshot's.

    A cluster to allocate has a ``host`` if one was set aside for it.
    """
    cdef uint64_t host = entry & OFFSET_MASK
    place.entry, place.host = entry, 0
    if entry & COMPRESSED:
        place.kind = TO_ALLOCATE if write else PACKED
        return 0
    if entry & ~(COPIED | OFFSET_MASK | ZERO) or host & ((<uint64_t>1 << image.cluster_bits) - 1):
        return -EIO
    if (entry & ZERO and image.version < 3) or (entry & COPIED and not host):
        return -EIO
    own = own and entry & COPIED
    if write and own and image._protected.holds(host >> image.cluster_bits):
        return -EIO  # a guest does not write to the tables
    if entry & ZERO:
        place.kind = TO_ALLOCATE if write else ZEROES
        if write and own:
            place.host = host
    elif not host:
        place.kind = TO_ALLOCATE if write else BEHIND
    elif write and not own:
        place.kind = TO_ALLOCATE
    else:
        place.kind, place.host = STORED, host
    return 0

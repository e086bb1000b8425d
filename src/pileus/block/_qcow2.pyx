# cython: cdivision=True
"""A QCOW2 image: where the bytes of a virtual disk are in a file that grows as they are written.

What is allocated and this image's alone is read and written in place (``map``). Everything else happens
here: holes are filled from the backing file, clusters that a snapshot shares are copied, compressed ones
unpacked. Tables are written back in an order in which a crash at any moment leaves at worst clusters that
nobody refers to::

    counts that rose, new tables, data → barrier → L2 → barrier → L1 → barrier → counts that fall

Source: QEMU, docs/interop/qcow2.rst.
"""

import os

from libc.errno cimport EAGAIN, EFBIG, EIO, ENOMEM, EROFS, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pileus._posix cimport (
    iovec,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from pileus.block._big_endian cimport htobe64, load_be64
from pileus.block._image cimport EXTENT_DATA, EXTENT_OTHER, EXTENT_ZERO, Extent, Image
from pileus.block._qcow2_compressed cimport Compressed
from pileus.block._qcow2_frees cimport Frees, Run
from pileus.block._qcow2_mapping cimport COMPRESSED, COPIED, OFFSET_MASK, ZERO, Mapping
from pileus.block._qcow2_refcounts cimport Refcounts
from pileus.block._slice_cache cimport Slot
from pileus.block._transfer cimport (
    Cursor,
    cursor_skip,
    cursor_start,
    cursor_take,
    cursor_zero,
    file_end,
    file_punch,
    file_sync,
    transfer_read,
    transfer_readv,
    transfer_write,
    transfer_writev,
    transfer_zeroes,
    zero_vector,
)

from pileus.errors import HostError


cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, long size)


cdef enum:
    CHUNK = 64 << 10            # bytes copied at a time
    WAITING_MAX = 64 << 20      # bytes given up before tables are written back to have them
    HEADER_FEATURES = 72        # of the header: u64 incompatible_features
    FEATURE_CORRUPT = 2
    VECTORS = 64
    PAGE = 4096


cdef class Qcow2Image(Image):
    """What ``header`` and ``l1`` (its offset and count of entries) describe. Does not own ``fd`` if this raises.

    Raises OSError, or ValueError saying what is wrong with the image.
    """

    def __cinit__(self, *_, **__):
        self.fd = -1
        pthread_mutex_init(&self._lock, NULL)
        pthread_mutex_init(&self._writer, NULL)

    def __init__(self, int fd, str path, header, *, uint64_t size, tuple l1, bint readonly, bint direct,
                 uint32_t align, bint extensible, Image backing):
        cdef uint32_t bits = header.cluster_bits
        cdef uint64_t clusters = (size + (<uint64_t>1 << bits) - 1) >> bits
        self.path, self.format, self.readonly, self.direct, self.size = path, "qcow2", readonly, direct, size
        self.version, self.cluster_bits, self.align, self.backing = header.version, bits, align, backing
        self.logical_block = max(512, align)
        if backing is not None and backing.direct:
            self.logical_block = max(self.logical_block, backing.logical_block)
        self.physical_block = max(self.logical_block, min(1 << bits, PAGE))
        self.can_discard = not readonly and (header.version >= 3 or backing is None)
        self._extensible, self._end = extensible, file_end(fd)
        self._frees = Frees()
        self._compressed = Compressed(fd, align, bits, header.zstd)
        self._mapping = Mapping(fd, align, bits, l1[0], l1[1], clusters)
        if not readonly:
            self.refcounts = Refcounts(
                fd, align, bits, header.refcount_order, header.refcount_table_offset, header.refcount_table_clusters
            )
            for first, count, what in header.tables():
                self.refcounts.protect(first, count, what)
            self._mapping.protect(self.refcounts.metadata)
        self.fd = fd

    def __dealloc__(self):
        pthread_mutex_destroy(&self._writer)
        pthread_mutex_destroy(&self._lock)

    def close(self):
        """Write back what is only in memory and close the file, and the backing file. Raises HostError."""
        cdef int rc = 0
        if self.fd < 0:
            return
        if not self.readonly:
            with nogil:
                pthread_mutex_lock(&self._writer)
                rc = self._commit(True)
                if rc == 0:
                    rc = self.refcounts.write_back()  # counts that only fell now
                pthread_mutex_unlock(&self._writer)
        os.close(self.fd)
        self.fd = -1
        if self.backing is not None:
            self.backing.close()
        if rc < 0:
            raise HostError("write", self.path, OSError(-rc, os.strerror(-rc)))

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
            if self.readonly or attempt:
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
        cdef uint64_t mask = (<uint64_t>1 << self._mapping.slice_entry_bits) - 1, index, run, backed
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
            rc = _classify(self, load_be64(slot.data, index), own, write, place)
            if rc < 0:
                return rc
            run = size - (offset & (size - 1))
            if place.kind == PACKED or (place.kind == TO_ALLOCATE and place.host):
                length = min(length, run)
            while run < length:
                index += 1
                rc = _classify(self, load_be64(slot.data, index), own, write, &following)
                if rc < 0 or following.kind != place.kind:
                    break
                if place.kind == STORED and following.host != place.host + ((index - (cluster & mask)) << self.cluster_bits):
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
        return self._read(&cursor, offset, _sum(vectors, count), False)

    cdef int _read(self, Cursor *cursor, uint64_t offset, uint64_t length, bint writer) noexcept nogil:
        cdef Place place
        cdef int rc
        while length:
            rc = self._locate(offset, length, False, writer, &place)
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

    # Writing

    cdef int _writable(self) noexcept nogil:
        """0 while the image's tables can be trusted; with the writer lock."""
        cdef uint64_t features
        if self.readonly:
            return -EROFS
        if self.refcounts.corrupt and not self._failed:
            self._failed = -EIO
            if self.version >= 3:  # so that whoever opens it next is told
                if transfer_read(self.fd, self.align, &features, 8, HEADER_FEATURES) == 0:
                    features |= htobe64(FEATURE_CORRUPT)
                    transfer_write(self.fd, self.align, &features, 8, HEADER_FEATURES)
        return self._failed

    cdef int write(self, const iovec *vectors, int count, uint64_t offset) noexcept nogil:
        cdef Cursor cursor
        cursor_start(&cursor, vectors, count)
        return self._write(&cursor, offset, _sum(vectors, count))

    cdef int _write(self, Cursor *cursor, uint64_t offset, uint64_t length) noexcept nogil:
        cdef Place place
        cdef uint64_t done
        cdef int rc
        if self.readonly or self._failed:
            return -EROFS if self.readonly else self._failed
        while length:
            rc = self._locate(offset, length, True, False, &place)
            if rc < 0:
                return rc
            if place.kind == STORED:
                rc = self._end_of_use(transfer_writev(self.fd, self.align, cursor, place.length, place.host))
                done = place.length
            else:
                self._end_of_use(0)
                pthread_mutex_lock(&self._writer)
                rc = self._writable()
                if rc == 0:
                    rc = self._allocate(cursor, offset, length, &done)
                    self._writable()
                pthread_mutex_unlock(&self._writer)
            if rc < 0:
                return rc
            offset += done
            length -= done
        return 0

    cdef int _allocate(self, Cursor *cursor, uint64_t offset, uint64_t length, uint64_t *done) noexcept nogil:
        """Write at ``offset`` into clusters that become this image's; *done is 0 if they already did."""
        cdef uint64_t cluster = offset >> self.cluster_bits, size = <uint64_t>1 << self.cluster_bits
        cdef uint64_t start = cluster << self.cluster_bits, count, got, end, index, host, freed
        cdef int64_t first = -1
        cdef bint fresh = False
        cdef Place place
        cdef int rc = self._locate(offset, length, True, True, &place)
        done[0] = 0
        if rc < 0:
            return rc
        self._end_of_use(0)
        if place.kind == STORED:
            return 0
        rc = self._own_table(cluster)
        if rc < 0:
            return rc
        if place.host:  # set aside for this cluster before, and reads as zeroes
            host, got = place.host, 1
        else:
            count = ((offset + place.length - 1) >> self.cluster_bits) - cluster + 1
            first = self.refcounts.allocate(count, &got)
            if first < 0:
                return <int>first
            host = <uint64_t>first << self.cluster_bits
            rc = _extend(self, host, got << self.cluster_bits, &fresh)
        end = min(offset + place.length, start + got * size)
        if rc == 0:
            rc = self._fill(start, offset - start, host, fresh)
        if rc == 0:
            rc = transfer_writev(self.fd, self.align, cursor, end - offset, host + offset - start)
        if rc == 0:
            rc = self._fill(end, start + got * size - end, host + end - start, fresh)
        index = 0
        while rc == 0 and index < got:
            rc = self._replace(cluster + index, (host + index * size) | COPIED)
            if rc == 0:
                index += 1
        if rc < 0 and first >= 0 and index < got:
            self.refcounts.drop(<uint64_t>first + index, got - index, &freed)
        if rc == 0:
            done[0] = end - offset
        return rc

    cdef int _fill(self, uint64_t offset, uint64_t length, uint64_t host, bint fresh) noexcept nogil:
        """Copy what the disk holds at ``offset`` to ``host``, a place that is ``fresh`` if it reads as zeroes."""
        cdef uint8_t *data = NULL
        cdef iovec whole
        cdef Cursor cursor
        cdef Place place
        cdef uint64_t step
        cdef int rc = 0
        while length and rc == 0:
            rc = self._locate(offset, length, False, True, &place)
            if rc < 0:
                break
            step = place.length
            if place.kind == ZEROES:
                self._end_of_use(0)
                if not fresh:
                    rc = transfer_zeroes(self.fd, self.align, step, host)
            else:
                if data == NULL:
                    data = <uint8_t *>malloc(CHUNK)
                if data == NULL:
                    rc = self._end_of_use(-ENOMEM)
                    break
                step = place.length = min(step, <uint64_t>CHUNK)
                whole.iov_base, whole.iov_len = data, step
                cursor_start(&cursor, &whole, 1)
                rc = self._end_of_use(self._read_place(&cursor, offset, &place))
                if rc == 0:
                    rc = transfer_write(self.fd, self.align, data, step, host)
            offset += step
            host += step
            length -= step
        free(data)
        return rc

    # Changing tables: all with the writer lock

    cdef int _find(self, uint64_t cluster, void **slot) noexcept nogil:
        """Take _lock and find the slice of L2 with ``cluster`` in it; keeps the lock if that works."""
        cdef int rc = 0, attempt
        for attempt in range(2):
            pthread_mutex_lock(&self._lock)
            rc = self._mapping.find(cluster, <Slot **>slot)
            if rc == 0:
                return 0
            pthread_mutex_unlock(&self._lock)
            if rc != -EAGAIN:
                return rc
            rc = self._commit(False)
            if rc < 0:
                return rc
        return -ENOMEM

    cdef int _own_table(self, uint64_t cluster) noexcept nogil:
        """See to it that there is an L2 table for ``cluster`` that is not a snapshot's, too."""
        cdef uint64_t old = self._mapping.l1_entry(cluster), size = <uint64_t>1 << self.cluster_bits, got, host
        cdef uint64_t done = 0, freed
        cdef int64_t first
        cdef bint fresh = False
        cdef uint8_t *data
        cdef int rc
        if old & COPIED:
            return 0
        first = self.refcounts.allocate(1, &got)
        if first < 0:
            return <int>first
        host = <uint64_t>first << self.cluster_bits
        rc = _extend(self, host, size, &fresh)
        if rc == 0 and not old and not fresh:
            rc = transfer_zeroes(self.fd, self.align, size, host)
        if rc == 0 and old:
            data = <uint8_t *>malloc(size)
            rc = -ENOMEM if data == NULL else transfer_read(self.fd, self.align, data, size, old & OFFSET_MASK)
            if rc == 0:
                rc = transfer_write(self.fd, self.align, data, size, host)
            free(data)
        if rc == 0:
            rc = self.refcounts.metadata.add(first)
        if rc < 0:
            self.refcounts.drop(first, 1, &freed)
            return rc
        pthread_mutex_lock(&self._lock)
        self._mapping.set_l1_entry(cluster, host | COPIED)
        if old:
            self.refcounts.metadata.remove((old & OFFSET_MASK) >> self.cluster_bits)
            self._frees.add((old & OFFSET_MASK) >> self.cluster_bits, 1)
        pthread_mutex_unlock(&self._lock)
        return 0

    cdef int _replace(self, uint64_t cluster, uint64_t entry) noexcept nogil:
        """Point ``cluster`` elsewhere; what it pointed at is given up."""
        cdef uint64_t old, offset, length
        cdef Slot *slot
        cdef int rc = self._find(cluster, <void **>&slot)
        if rc < 0:
            return rc
        old = load_be64(slot.data, cluster & ((<uint64_t>1 << self._mapping.slice_entry_bits) - 1))
        self._mapping.set_entry(slot, cluster, entry)
        if old & COMPRESSED:
            self._compressed.span(old, &offset, &length)
            length += offset & ((<uint64_t>1 << self.cluster_bits) - 1)
            self._frees.add(
                offset >> self.cluster_bits, (length + (<uint64_t>1 << self.cluster_bits) - 1) >> self.cluster_bits
            )
        elif old & OFFSET_MASK and (old ^ entry) & OFFSET_MASK:
            self._frees.add((old & OFFSET_MASK) >> self.cluster_bits, 1)
        if self._users == 0:
            self._frees.all_quiet()
        pthread_mutex_unlock(&self._lock)
        return 0

    # Flushing

    cdef int flush(self) noexcept nogil:
        cdef bint clean
        cdef int rc = 0
        if self.readonly:
            return 0
        pthread_mutex_lock(&self._writer)
        clean = not (self._failed or self.refcounts.is_dirty() or self._mapping.is_dirty() or self._frees.clusters)
        if not clean:
            rc = self._commit(True)
        pthread_mutex_unlock(&self._writer)
        return file_sync(self.fd) if clean else rc

    cdef int _commit(self, bint stable) noexcept nogil:
        """Write the tables back in order; ``stable``: and all there is to stable storage."""
        cdef bint wrote
        cdef int rc
        if self._failed:
            return self._failed
        rc = self.refcounts.write_back()
        if rc < 0:
            return rc
        if self._mapping.is_dirty():
            rc = file_sync(self.fd)  # counts, data and new tables before what refers to them
            if rc == 0:
                rc = self._mapping.write_tables()
                if rc < 0:
                    return rc
            if rc == 0 and self._mapping._l1_changed:
                rc = file_sync(self.fd)  # L2 before L1
            if rc == 0:
                rc = self._mapping.write_l1(&wrote)
                if rc < 0:
                    return rc
        if rc == 0 and (stable or self._frees.clusters):
            rc = file_sync(self.fd)  # what no longer refers to a cluster before that can be something else
        if rc < 0:
            # After a failed sync nobody knows what the file holds, and a second one would tell lies.
            self._failed = rc
            return rc
        return self._free_old()

    cdef int _free_old(self) noexcept nogil:
        """Let go of clusters that nothing on stable storage refers to, and nobody uses."""
        cdef uint64_t freed
        cdef bint more
        cdef Run run
        while True:
            pthread_mutex_lock(&self._lock)
            more = self._frees.take(&run)
            pthread_mutex_unlock(&self._lock)
            if not more:
                return 0
            self.refcounts.drop(run.first, run.count, &freed)
            if freed == run.count and self.cluster_bits >= 12:
                file_punch(self.fd, run.first << self.cluster_bits, run.count << self.cluster_bits)

    # Giving up

    cdef int discard(self, uint64_t offset, uint64_t length) noexcept nogil:
        return self._unmap(offset, length, False, True) if self.can_discard else 0

    cdef int write_zeroes(self, uint64_t offset, uint64_t length, bint unmap) noexcept nogil:
        cdef uint64_t mask = (<uint64_t>1 << self.cluster_bits) - 1, end = offset + length
        cdef uint64_t head = min((offset + mask) & ~mask, end), tail = end if end == self.size else max(end & ~mask, head)
        cdef int rc = -EROFS if self.readonly else self._write_zeroes(offset, head - offset)
        if rc == 0:
            rc = self._write_zeroes(tail, end - tail)
        if rc == 0 and tail > head:
            rc = self._unmap(head, tail - head, True, unmap)
        return rc

    cdef int _write_zeroes(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Zeroes where there are none, by writing them."""
        cdef Place place
        cdef iovec some
        cdef Cursor cursor
        cdef uint64_t step
        cdef int rc
        while length:
            rc = self._locate(offset, length, False, False, &place)
            if rc < 0:
                return rc
            self._end_of_use(0)
            step = place.length
            if place.kind != ZEROES:
                step = zero_vector(&some, step)
                cursor_start(&cursor, &some, 1)
                rc = self._write(&cursor, offset, step)
                if rc < 0:
                    return rc
            offset += step
            length -= step
        return 0

    cdef int _unmap(self, uint64_t offset, uint64_t length, bint zero, bint unmap) noexcept nogil:
        """Give up the whole clusters of a range; ``zero``: they must read as zeroes then."""
        cdef uint64_t mask = (<uint64_t>1 << self.cluster_bits) - 1, end = offset + length
        cdef uint64_t cluster = (offset + mask) >> self.cluster_bits, last = end >> self.cluster_bits
        cdef uint64_t table = <uint64_t>1 << self._mapping.table_bits
        cdef int rc = 0
        if end == self.size:
            last = (end + mask) >> self.cluster_bits
        while cluster < last and rc == 0:
            pthread_mutex_lock(&self._writer)
            rc = self._writable()
            while cluster < last and rc == 0:
                if not self._mapping.l1_entry(cluster) and not (zero and cluster << self.cluster_bits < self._backed()):
                    cluster = (cluster | (table - 1)) + 1
                    continue
                rc = self._clear(cluster, zero, unmap)
                cluster += 1
            if rc >= 0 and self._frees.clusters << self.cluster_bits >= WAITING_MAX:
                self._commit(False)
            self._writable()
            pthread_mutex_unlock(&self._writer)
            if rc > 0:  # only written zeroes will do
                offset = (cluster - 1) << self.cluster_bits
                rc = self._write_zeroes(offset, min(self.size - offset, mask + 1))
        return rc

    cdef int _clear(self, uint64_t cluster, bint zero, bint unmap) noexcept nogil:
        """Make ``cluster`` read as zeroes, or leave it as it is; 1 if it takes written zeroes to do so."""
        cdef bint behind = cluster << self.cluster_bits < self._backed()
        cdef uint64_t entry = 0, after
        cdef Slot *slot
        cdef Place place
        cdef int rc = self._find(cluster, <void **>&slot)
        if rc < 0:
            return rc
        if slot != NULL:
            entry = load_be64(slot.data, cluster & ((<uint64_t>1 << self._mapping.slice_entry_bits) - 1))
            rc = _classify(self, entry, True, False, &place)
        pthread_mutex_unlock(&self._lock)
        if rc < 0:
            return rc
        if not entry & (COMPRESSED | OFFSET_MASK) and (entry & ZERO or not behind or not zero):
            return 0  # there is nothing to give up, and it does read as zeroes where it has to
        if self.version < 3 and (behind or not (unmap or entry & COMPRESSED or not entry & COPIED)):
            return zero
        if entry & (COMPRESSED | OFFSET_MASK) and not unmap and entry & COPIED and not entry & COMPRESSED:
            after = entry | ZERO
        else:
            after = ZERO if behind else 0
        if after == entry:
            return 0
        rc = self._own_table(cluster)
        return self._replace(cluster, after) if rc == 0 else rc


cdef uint64_t _sum(const iovec *vectors, int count) noexcept nogil:
    cdef uint64_t length = 0
    cdef int index
    for index in range(count):
        length += vectors[index].iov_len
    return length


cdef int _extend(Qcow2Image image, uint64_t host, uint64_t length, bint *fresh) noexcept nogil:
    """Make the file reach over new clusters; *fresh if they lay behind its end, and so read as zeroes."""
    cdef uint64_t end
    fresh[0] = False
    if not image._extensible:
        return 0
    end = file_end(image.fd)
    if host >= end:
        if host + length >> 62:
            return -EFBIG
        if ftruncate(image.fd, <long>(host + length)) < 0:
            return -errno
        fresh[0] = True
    return 0


cdef int _classify(Qcow2Image image, uint64_t entry, bint own, bint write, Place *place) noexcept nogil:
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
    if write and own and image.refcounts.metadata.holds(host >> image.cluster_bits):
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

# cython: cdivision=True
"""Writing to a QCOW2 image, whose file grows as it is written.

What is allocated and this image's alone is written in place (``map``). Everything else happens here: holes
are filled from the backing file, clusters that a snapshot shares are copied. Tables are written back in an
order in which a crash at any moment leaves at worst clusters that nobody refers to::

    counts that rose, new tables, data → barrier → L2 → barrier → L1 → barrier → counts that fall

Source: QEMU, docs/interop/qcow2.rst.
"""

import os

from libc.errno cimport EAGAIN, EFBIG, ENOMEM, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pileus._posix cimport iovec, pthread_mutex_lock, pthread_mutex_unlock
from pileus.block._big_endian cimport htobe64, load_be64
from pileus.block._image cimport Image
from pileus.block._qcow2 cimport STORED, ZEROES, Place, Qcow2Image, classify, total_length
from pileus.block._qcow2_frees cimport Run
from pileus.block._qcow2_mapping cimport COMPRESSED, COPIED, OFFSET_MASK, ZERO
from pileus.block._qcow2_refcounts cimport Refcounts
from pileus.block._slice_cache cimport Slot
from pileus.block._transfer cimport (
    Cursor,
    cursor_start,
    file_end,
    file_punch,
    file_sync,
    transfer_read,
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
    TURN = 1024                 # clusters given up before another writer may have its turn
    HEADER_FEATURES = 72        # of the header: u64 incompatible_features
    FEATURE_CORRUPT = 2


cdef class Qcow2Writer(Qcow2Image):
    """``extensible``: the file is a regular one, which grows by being written."""

    def __init__(self, int fd, str path, header, *, uint64_t size, tuple l1, bint direct, uint32_t align,
                 bint extensible, Image backing):
        Qcow2Image.__init__(
            self, fd, path, header, size=size, l1=l1, direct=direct, align=align, backing=backing
        )
        self.fd = -1  # not ours yet
        self.readonly = False
        self.can_discard = header.version >= 3 or backing is None
        self._extensible = extensible
        self.refcounts = Refcounts(
            fd, align, self.cluster_bits, header.refcount_order, header.refcount_table_offset,
            header.refcount_table_clusters,
        )
        for first, count, what in header.tables():
            self.refcounts.protect(first, count, what)
        self._protected = self.refcounts.metadata
        self._mapping.protect(self._protected)
        self.fd = fd

    def close(self):
        """Write back what is only in memory and close the file, and the backing file. Raises HostError."""
        cdef int rc
        if self.fd < 0:
            return
        with nogil:
            pthread_mutex_lock(&self._writer)
            rc = self._commit(True)
            if rc == 0:
                rc = self.refcounts.write_back()  # counts that only fell now
            pthread_mutex_unlock(&self._writer)
        Qcow2Image.close(self)
        if rc < 0:
            raise HostError("write", self.path, OSError(-rc, os.strerror(-rc)))

    cdef int _writable(self) noexcept nogil:
        """0 while the image's tables can be trusted; with the writer lock."""
        cdef uint64_t features
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
        return self._write(&cursor, offset, total_length(vectors, count))

    cdef int _write(self, Cursor *cursor, uint64_t offset, uint64_t length) noexcept nogil:
        cdef Place place
        cdef uint64_t done
        cdef int rc
        if self._failed:
            return self._failed
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

    cdef int _find(self, uint64_t cluster, Slot **slot) noexcept nogil:
        """Take _lock and find the slice of L2 with ``cluster`` in it; keeps the lock if that works."""
        cdef int rc = 0, attempt
        for attempt in range(2):
            pthread_mutex_lock(&self._lock)
            rc = self._mapping.find(cluster, slot)
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
        cdef int rc = self._find(cluster, &slot)
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
        cdef int rc = self._write_zeroes(offset, head - offset)
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
        cdef uint64_t table = <uint64_t>1 << self._mapping.table_bits, turn
        cdef bint behind
        cdef int rc = 0
        if end == self.size:
            last = (end + mask) >> self.cluster_bits
        while cluster < last and rc == 0:
            pthread_mutex_lock(&self._writer)
            rc = self._writable()
            turn = min(last, cluster + TURN)
            while cluster < turn and rc == 0:
                behind = cluster << self.cluster_bits < self._backed()
                if not self._mapping.l1_entry(cluster) and not (zero and behind):
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
        cdef int rc = self._find(cluster, &slot)
        if rc < 0:
            return rc
        if slot != NULL:
            entry = load_be64(slot.data, cluster & ((<uint64_t>1 << self._mapping.slice_entry_bits) - 1))
            rc = classify(self, entry, True, False, &place)
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


cdef int _extend(Qcow2Writer image, uint64_t host, uint64_t length, bint *fresh) noexcept nogil:
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

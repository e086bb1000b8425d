# cython: cdivision=True
"""Which clusters of a QCOW2 file are in use: refcounts of 1 to 64 bits in blocks, found through one table.

Counts rise in memory the moment a cluster is taken, and may be written at any time after: at worst a crash
leaves a cluster that nobody refers to. They fall (``drop``) only when the tables that no longer refer to the
cluster are on stable storage, which is the caller's business. So what is in the cache is always safe to write.

A block for a part of the file that has none yet is put into that part, and counts itself. So is a larger table.

Source: QEMU, docs/interop/qcow2.rst, "Host cluster management".
"""

import os

from libc.errno cimport EFBIG, EIO, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from pileus.block._big_endian cimport htobe32, htobe64, load_be64, load_bits, store_be64, store_bits
from pileus.block._cluster_set cimport ClusterSet
from pileus.block._slice_cache cimport SliceCache, Slot
from pileus.block._transfer cimport file_sync, transfer_read, transfer_write


cdef enum:
    SLICE_BITS = 12                 # pieces of a block in the cache, or whole blocks where those are smaller
    CACHED_SLICES = 64
    TABLE_MAX = 8 << 20             # bytes, as in QEMU
    HEADER_TABLE_OFFSET = 48        # of the header: u64 refcount_table_offset, u32 refcount_table_clusters
    OFFSET_BITS = 56                # of a host offset in an L1 or L2 entry


cdef class Refcounts:
    """Raises OSError, or ValueError saying what is wrong with the table."""

    def __cinit__(self, int fd, uint32_t align, uint32_t cluster_bits, uint32_t order, uint64_t table_offset,
                  uint32_t table_clusters):
        cdef uint64_t size = <uint64_t>table_clusters << cluster_bits, index, entry
        cdef int rc
        self._fd, self._align, self._cluster_bits, self._order = fd, align, cluster_bits, order
        self._block_bits = cluster_bits + 3 - order
        self._slice_bits = min(cluster_bits, <uint32_t>SLICE_BITS)
        self._slice_entry_bits = self._slice_bits + 3 - order
        self._table_offset, self._entries = table_offset, size >> 3
        self.metadata = ClusterSet()
        self._cache = SliceCache(<size_t>1 << self._slice_bits, CACHED_SLICES)
        if size > TABLE_MAX:
            raise ValueError(f"its refcount table has {size} bytes; at most {TABLE_MAX} are read")
        self._table = <uint64_t *>malloc(size)
        if self._table == NULL:
            raise MemoryError
        rc = transfer_read(fd, align, self._table, size, table_offset)
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))
        for index in range(self._entries):
            entry = load_be64(self._table, index)
            self._table[index] = entry
            if entry & ((<uint64_t>1 << cluster_bits) - 1) or entry >> 62:
                raise ValueError(f"entry {index} of its refcount table, {entry:#x}, is no place of a cluster")
            if entry:
                self.protect(entry >> cluster_bits, 1, "a refcount block")

    def __dealloc__(self):
        free(self._table)

    def protect(self, uint64_t first, uint64_t count, str what):
        """Note that ``count`` clusters are tables. Raises ValueError where they are others' already."""
        cdef uint64_t cluster
        cdef int rc
        for cluster in range(first, first + count):
            rc = self.metadata.add(cluster)
            if rc < 0:
                raise MemoryError
            if rc:
                raise ValueError(f"{what} at {cluster << self._cluster_bits:#x} lies on another of its tables")

    cdef int _spoilt(self) noexcept nogil:
        self.corrupt = True
        return -EIO

    cdef int _find(self, uint64_t cluster, Slot **slot) noexcept nogil:
        """Point at the slice with the count of ``cluster``; NULL where there is no block."""
        cdef uint64_t index = cluster >> self._block_bits, key = cluster >> self._slice_entry_bits, inside
        cdef int rc
        slot[0] = NULL
        if index >= self._entries or not self._table[index]:
            return 0
        slot[0] = self._cache.find(key)
        if slot[0] != NULL:
            return 0
        inside = (key & ((<uint64_t>1 << (self._block_bits - self._slice_entry_bits)) - 1)) << self._slice_bits
        slot[0] = self._cache.claim(key, self._table[index] + inside)
        if slot[0] == NULL:
            rc = self._cache.write_back(self._fd, self._align)
            if rc < 0:
                return rc
            slot[0] = self._cache.claim(key, self._table[index] + inside)
            if slot[0] == NULL:
                return -ENOMEM
        rc = transfer_read(self._fd, self._align, slot[0].data, self._cache.slice_size, slot[0].place)
        if rc < 0:
            self._cache.forget(slot[0])
            slot[0] = NULL
        return rc

    cdef int get(self, uint64_t cluster, uint64_t *value) noexcept nogil:
        cdef Slot *slot
        cdef int rc = self._find(cluster, &slot)
        value[0] = 0
        if rc == 0 and slot != NULL:
            value[0] = load_bits(slot.data, cluster & ((<uint64_t>1 << self._slice_entry_bits) - 1), self._order)
        return rc

    cdef int _set(self, uint64_t cluster, uint64_t value) noexcept nogil:
        cdef Slot *slot
        cdef int rc = self._find(cluster, &slot)
        if rc < 0:
            return rc
        if slot == NULL:
            return self._spoilt()
        store_bits(slot.data, cluster & ((<uint64_t>1 << self._slice_entry_bits) - 1), self._order, value)
        self._cache.touch(slot)
        return 0

    cdef int64_t allocate(self, uint64_t wanted, uint64_t *count) noexcept nogil:
        cdef uint64_t cluster = self._hint, mask = (<uint64_t>1 << self._slice_entry_bits) - 1, index, first
        cdef Slot *slot
        cdef int rc
        while True:
            if cluster >> (OFFSET_BITS - self._cluster_bits):
                return -EFBIG
            index = cluster >> self._block_bits
            if index >= self._entries:
                rc = self._grow(cluster)
                if rc < 0:
                    return rc
                continue
            if not self._table[index]:
                rc = self._make_block(cluster)
                if rc < 0:
                    return rc
            rc = self._find(cluster, &slot)
            if rc < 0:
                return rc
            index = cluster & mask
            while index <= mask and load_bits(slot.data, index, self._order):
                index += 1
            cluster = (cluster & ~mask) + index
            if index <= mask:
                break
        first = cluster
        count[0] = 0
        while count[0] < wanted and index <= mask and not load_bits(slot.data, index, self._order):
            if self.metadata.holds(first + count[0]):  # in use, says the table that refers to it
                if count[0]:
                    break
                return self._spoilt()
            store_bits(slot.data, index, self._order, 1)
            count[0] += 1
            index += 1
        self._cache.touch(slot)
        self._hint = first + count[0]
        return <int64_t>first

    cdef int drop(self, uint64_t first, uint64_t count, uint64_t *freed) noexcept nogil:
        cdef uint64_t cluster, value
        cdef int rc, result = 0
        freed[0] = 0
        for cluster in range(first, first + count):
            rc = self.get(cluster, &value)
            if rc == 0:
                rc = self._set(cluster, value - 1) if value and not self.metadata.holds(cluster) else self._spoilt()
            if rc < 0:
                result = rc
                continue
            if value == 1:
                freed[0] += 1
                self._hint = min(self._hint, cluster)
        return result

    cdef bint is_dirty(self) noexcept nogil:
        return self._cache.dirty != 0

    cdef int write_back(self) noexcept nogil:
        return self._cache.write_back(self._fd, self._align)

    cdef int _make_block(self, uint64_t cluster) noexcept nogil:
        """Make ``cluster``, in a part of the file without a block, that block."""
        cdef size_t size = <size_t>1 << self._cluster_bits
        cdef uint64_t index = cluster >> self._block_bits, place = cluster << self._cluster_bits, entry
        cdef uint8_t *block
        cdef int rc
        if self.metadata.holds(cluster):
            return self._spoilt()
        if self.metadata.add(cluster) < 0:
            return -ENOMEM
        block = <uint8_t *>calloc(1, size)
        if block == NULL:
            rc = -ENOMEM
        else:
            store_bits(block, cluster & ((<uint64_t>1 << self._block_bits) - 1), self._order, 1)
            rc = transfer_write(self._fd, self._align, block, size, place)
            free(block)
        if rc == 0:
            rc = file_sync(self._fd)  # before the table says that this is a block
        if rc == 0:
            entry = htobe64(place)
            rc = transfer_write(self._fd, self._align, &entry, sizeof(entry), self._table_offset + 8 * index)
        if rc < 0:
            self.metadata.remove(cluster)
            return rc
        self._table[index] = place
        return 0

    cdef int _grow(self, uint64_t cluster) noexcept nogil:
        """Move to a table that covers ``cluster``, the first that the present one does not; half as much again.

        The new blocks come first, then the new table, from ``cluster`` on.
        """
        cdef uint64_t per_cluster = <uint64_t>1 << (self._cluster_bits - 3), first_block = cluster >> self._block_bits
        cdef uint64_t blocks = 0, clusters = 0, needed = 1, wanted = self._entries + self._entries // 2 + 1
        cdef uint64_t index, at, old_first, old_count, freed
        cdef size_t size = <size_t>1 << self._cluster_bits
        cdef uint64_t *table
        cdef uint8_t *data
        cdef uint8_t[12] header
        cdef int rc = 0
        while blocks < needed:  # each round covers what the last one came to
            blocks = needed
            clusters = (max(wanted, first_block + blocks) + per_cluster - 1) // per_cluster
            needed = ((cluster + blocks + clusters - 1) >> self._block_bits) - first_block + 1
        if clusters << self._cluster_bits > TABLE_MAX:
            return -EFBIG
        if self.metadata.holds_any(cluster, blocks + clusters):
            return self._spoilt()
        table = <uint64_t *>calloc(clusters, size)
        data = <uint8_t *>malloc(max(size, <size_t>(clusters << self._cluster_bits)))
        if table == NULL or data == NULL:
            rc = -ENOMEM
        if rc == 0:
            for index in range(self._entries):
                table[index] = self._table[index]
            for index in range(blocks):
                for at in range(size):
                    data[at] = 0
                table[first_block + index] = (cluster + index) << self._cluster_bits
                for at in range(cluster, cluster + blocks + clusters):
                    if at >> self._block_bits == first_block + index:
                        store_bits(data, at & ((<uint64_t>1 << self._block_bits) - 1), self._order, 1)
                rc = transfer_write(self._fd, self._align, data, size, (cluster + index) << self._cluster_bits)
                if rc < 0:
                    break
        if rc == 0:
            for index in range(clusters * per_cluster):
                store_be64(data, index, table[index])
            rc = transfer_write(self._fd, self._align, data, clusters * size, (cluster + blocks) << self._cluster_bits)
        # The blocks that this table shares with the old one have to be as new as it is: then its header.
        if rc == 0:
            rc = self.write_back()
        if rc == 0:
            rc = file_sync(self._fd)
        if rc == 0:
            (<uint64_t *>header)[0] = htobe64((cluster + blocks) << self._cluster_bits)
            (<uint32_t *>(<uint8_t *>header + 8))[0] = htobe32(<uint32_t>clusters)
            rc = transfer_write(self._fd, self._align, header, sizeof(header), HEADER_TABLE_OFFSET)
        if rc == 0:
            rc = file_sync(self._fd)  # before the old table's clusters can be anything else
        free(data)
        if rc < 0:
            free(table)
            return rc
        old_first, old_count = self._table_offset >> self._cluster_bits, self._entries // per_cluster
        free(self._table)
        self._table, self._entries = table, clusters * per_cluster
        self._table_offset = (cluster + blocks) << self._cluster_bits
        for at in range(cluster, cluster + blocks + clusters):
            if self.metadata.add(at) < 0:
                return -ENOMEM
        for at in range(old_first, old_first + old_count):
            self.metadata.remove(at)
        return self.drop(old_first, old_count, &freed)

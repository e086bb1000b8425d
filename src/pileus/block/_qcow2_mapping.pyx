# cython: cdivision=True
"""From clusters of the virtual disk to clusters of the file: an L1 table in memory, slices of L2 tables in a cache.

Source: QEMU, docs/interop/qcow2.rst, "Cluster mapping".
"""

import os

from libc.errno cimport EAGAIN, EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from pileus.block._big_endian cimport load_be64, store_be64
from pileus.block._cluster_set cimport ClusterSet
from pileus.block._slice_cache cimport SliceCache, Slot
from pileus.block._transfer cimport transfer_read, transfer_write


cdef enum:
    SLICE_BITS = 12
    CACHE_MIN = 64 << 10    # bytes of L2 entries
    CACHE_MAX = 32 << 20
    SECTOR_ENTRIES = 64     # L1 entries in 512 bytes, which are written as one


cdef class Mapping:
    """``disk_clusters`` is what the cache is made for. Raises OSError or MemoryError."""

    def __cinit__(self, int fd, uint32_t align, uint32_t cluster_bits, uint64_t l1_offset, uint64_t l1_size,
                  uint64_t disk_clusters):
        cdef uint64_t sectors = (l1_size + SECTOR_ENTRIES - 1) // SECTOR_ENTRIES, index
        cdef int rc
        self._fd, self._align, self._cluster_bits = fd, align, cluster_bits
        self.table_bits = cluster_bits - 3
        self._slice_bits = min(cluster_bits, <uint32_t>SLICE_BITS)
        self.slice_entry_bits = self._slice_bits - 3
        self._l1_offset, self._l1_size = l1_offset, l1_size
        self._cache = SliceCache(
            <size_t>1 << self._slice_bits,
            min(max(disk_clusters * 8, <uint64_t>CACHE_MIN), <uint64_t>CACHE_MAX) >> self._slice_bits,
        )
        self._l1 = <uint64_t *>calloc(sectors + 1, 512)
        self._l1_dirty = <uint8_t *>calloc(sectors + 1, 1)
        if self._l1 == NULL or self._l1_dirty == NULL:
            raise MemoryError
        rc = transfer_read(fd, align, self._l1, l1_size * 8, l1_offset)
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))
        for index in range(l1_size):
            self._l1[index] = load_be64(self._l1, index)

    def __dealloc__(self):
        free(self._l1)
        free(self._l1_dirty)

    def protect(self, ClusterSet clusters):
        """Add each L2 table to ``clusters``. Raises ValueError for one that is there, or that is no table's place."""
        cdef uint64_t index, entry
        cdef int rc
        for index in range(self._l1_size):
            entry = self._l1[index]
            if not entry:
                continue
            if _bad_table(entry, self._cluster_bits):
                raise ValueError(f"entry {index} of its L1 table, {entry:#x}, is no place of a cluster")
            rc = clusters.add((entry & OFFSET_MASK) >> self._cluster_bits)
            if rc < 0:
                raise MemoryError
            if rc:
                raise ValueError(f"entry {index} of its L1 table, {entry:#x}, lies on another of its tables")

    cdef uint64_t l1_entry(self, uint64_t cluster) noexcept nogil:
        cdef uint64_t index = cluster >> self.table_bits
        return self._l1[index] if index < self._l1_size else 0

    cdef int find(self, uint64_t cluster, Slot **slot) noexcept nogil:
        cdef uint64_t key = cluster >> self.slice_entry_bits, index, entry
        cdef int rc
        slot[0] = self._cache.find(key)
        if slot[0] != NULL:
            return 0
        index = cluster >> self.table_bits
        if index >= self._l1_size:
            return -EIO
        entry = self._l1[index]
        if not entry:
            return 0
        if _bad_table(entry, self._cluster_bits):
            return -EIO
        slot[0] = self._cache.claim(key, (entry & OFFSET_MASK) + _inside(self, key))
        if slot[0] == NULL:
            return -EAGAIN
        rc = transfer_read(self._fd, self._align, slot[0].data, self._cache.slice_size, slot[0].place)
        if rc < 0:
            self._cache.forget(slot[0])
            slot[0] = NULL
        return rc

    cdef void set_l1_entry(self, uint64_t cluster, uint64_t entry) noexcept nogil:
        cdef uint64_t index = cluster >> self.table_bits, key
        cdef uint64_t first = index << (self.table_bits - self.slice_entry_bits)
        cdef Slot *slot
        for key in range(first, first + (<uint64_t>1 << (self.table_bits - self.slice_entry_bits))):
            slot = self._cache.find(key)
            if slot != NULL:
                self._cache.forget(slot)
        self._l1[index] = entry
        self._l1_dirty[index // SECTOR_ENTRIES] = 1
        self._l1_changed = True

    cdef void set_entry(self, Slot *slot, uint64_t cluster, uint64_t entry) noexcept nogil:
        store_be64(slot.data, cluster & ((<uint64_t>1 << self.slice_entry_bits) - 1), entry)
        self._cache.touch(slot)

    cdef bint is_dirty(self) noexcept nogil:
        return self._l1_changed or self._cache.dirty != 0

    cdef int write_tables(self) noexcept nogil:
        return self._cache.write_back(self._fd, self._align)

    cdef int write_l1(self, bint *wrote) noexcept nogil:
        cdef uint64_t[SECTOR_ENTRIES] sector
        cdef uint64_t index, at, entries
        cdef int rc
        wrote[0] = self._l1_changed
        if not self._l1_changed:
            return 0
        for index in range((self._l1_size + SECTOR_ENTRIES - 1) // SECTOR_ENTRIES):
            if not self._l1_dirty[index]:
                continue
            entries = min(self._l1_size - index * SECTOR_ENTRIES, <uint64_t>SECTOR_ENTRIES)
            for at in range(entries):
                store_be64(sector, at, self._l1[index * SECTOR_ENTRIES + at])
            rc = transfer_write(self._fd, self._align, sector, entries * 8, self._l1_offset + 512 * index)
            if rc < 0:
                return rc
            self._l1_dirty[index] = 0
        self._l1_changed = False
        return 0


cdef inline uint64_t _inside(Mapping mapping, uint64_t key) noexcept nogil:
    """Where in its table the slice ``key`` is, in bytes."""
    cdef uint32_t bits = mapping.table_bits - mapping.slice_entry_bits
    return (key & ((<uint64_t>1 << bits) - 1)) << mapping._slice_bits


cdef inline bint _bad_table(uint64_t entry, uint32_t cluster_bits) noexcept nogil:
    """Whether an L1 entry has reserved bits set, or points beside a cluster boundary."""
    if entry & ~(COPIED | OFFSET_MASK):
        return True
    return (entry & OFFSET_MASK) == 0 or (entry & OFFSET_MASK & ((<uint64_t>1 << cluster_bits) - 1)) != 0

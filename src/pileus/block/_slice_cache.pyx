"""A bounded cache of slices, a few KiB each, of tables that are too large to hold: L2 tables, refcount blocks.

Memory is taken slice by slice as it is used.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from pileus.block._transfer cimport transfer_write


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **place, size_t align, size_t size)


cdef enum:
    WAYS = 8  # slots that a slice may be in


cdef class SliceCache:
    """``count`` slices of ``slice_size`` bytes, the least recently used of a set giving way."""

    def __cinit__(self, size_t slice_size, uint64_t count):
        self.slice_size, self.dirty, self._tick, self._sets = slice_size, 0, 0, 1
        while self._sets * WAYS < count:
            self._sets *= 2
        self._slots = <Slot *>calloc(self._sets * WAYS, sizeof(Slot))
        if self._slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef uint64_t index
        if self._slots != NULL:
            for index in range(self._sets * WAYS):
                free(self._slots[index].data)
            free(self._slots)

    cdef Slot *find(self, uint64_t key) noexcept nogil:
        cdef Slot *slot = &self._slots[(key & (self._sets - 1)) * WAYS]
        cdef int way
        for way in range(WAYS):
            if slot[way].key == key + 1:
                self._tick += 1
                slot[way].used = self._tick
                return &slot[way]
        return NULL

    cdef Slot *claim(self, uint64_t key, uint64_t place) noexcept nogil:
        cdef Slot *slots = &self._slots[(key & (self._sets - 1)) * WAYS]
        cdef Slot *best = NULL
        cdef uint32_t age, oldest = 0
        cdef int way
        for way in range(WAYS):
            if slots[way].dirty:
                continue
            if slots[way].key == 0:
                best = &slots[way]
                break
            age = self._tick - slots[way].used
            if best == NULL or age > oldest:
                best, oldest = &slots[way], age
        if best == NULL:
            return NULL
        # Aligned, so that O_DIRECT takes a slice as it is.
        if best.data == NULL and posix_memalign(<void **>&best.data, 4096, self.slice_size):
            best.data = NULL
            return NULL
        self._tick += 1
        best.key, best.place, best.used = key + 1, place, self._tick
        return best

    cdef void forget(self, Slot *slot) noexcept nogil:
        if slot.dirty:
            slot.dirty = False
            self.dirty -= 1
        slot.key = 0

    cdef void touch(self, Slot *slot) noexcept nogil:
        if not slot.dirty:
            slot.dirty = True
            self.dirty += 1

    cdef int write_back(self, int fd, uint32_t align) noexcept nogil:
        """Write all that is dirty; 0 or the first error, after which the rest stays dirty."""
        cdef uint64_t index
        cdef int rc
        if not self.dirty:
            return 0
        for index in range(self._sets * WAYS):
            if self._slots[index].dirty:
                rc = transfer_write(fd, align, self._slots[index].data, self.slice_size, self._slots[index].place)
                if rc < 0:
                    return rc
                # Last: a clean slot may be taken away at once by a thread that looks up another slice.
                self.dirty -= 1
                self._slots[index].dirty = False
                if not self.dirty:
                    return 0
        return 0

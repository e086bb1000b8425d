"""What is mapped where in one address space: intervals of IOVAs, none of which overlap.

They lie sorted in chunks of a few KiB, and the chunks lie sorted in an array: to look one up is two binary searches
in neighbouring memory, to add or remove one moves little. Nothing is locked here.

Source: virtio 1.2, 5.13.6.5 (MAP request) and 5.13.6.6 (UNMAP request)
"""

from libc.errno cimport EEXIST, ENOMEM, ERANGE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove


cdef enum:
    FIRST_CAPACITY = 8  # chunks


cdef class Mappings:
    """Intervals [first, last] of IOVAs, each with the GPA of its first byte and what a device may do there."""

    def __dealloc__(self):
        cdef uint32_t index
        for index in range(self.length):
            free(self.chunks[index])
        free(self.chunks)

    # -- the compiled face ------------------------------------------------------------------------

    cdef Mapping *at(self, uint64_t iova) noexcept nogil:
        cdef uint32_t index = self._chunk(iova)
        cdef Mapping *found
        if index == self.length:
            return NULL
        found = &self.chunks[index].items[_place(self.chunks[index], iova)]
        return found if found.first <= iova else NULL

    cdef int add(self, uint64_t first, uint64_t last, uint64_t gpa, uint32_t access) noexcept nogil:
        cdef uint32_t index = self._chunk(first), place
        cdef Chunk *chunk
        cdef Mapping *item
        if index == self.length:
            # Behind all others: at the end of the last chunk, if there is one.
            if index == 0:
                chunk = <Chunk *>malloc(sizeof(Chunk))
                if chunk == NULL or self._insert_chunk(0, chunk) < 0:
                    free(chunk)
                    return -ENOMEM
                chunk.count = 0
                index = 1
            index -= 1
            place = self.chunks[index].count
        else:
            place = _place(self.chunks[index], first)
            if self.chunks[index].items[place].first <= last:
                return -EEXIST
        if self.chunks[index].count == CHUNK:
            if self._split(index) < 0:
                return -ENOMEM
            if place > self.chunks[index].count:
                place -= self.chunks[index].count
                index += 1
        chunk = self.chunks[index]
        item = &chunk.items[place]
        memmove(item + 1, item, (chunk.count - place) * sizeof(Mapping))
        item.first, item.last, item.gpa, item.access = first, last, gpa, access
        chunk.count += 1
        self.count += 1
        return 0

    cdef long long remove(self, uint64_t first, uint64_t last) noexcept nogil:
        cdef uint32_t index = self._chunk(first), place, end
        cdef Mapping *edge
        cdef Chunk *chunk
        cdef long long removed = 0
        if index == self.length:
            return 0
        place = _place(self.chunks[index], first)
        if self.chunks[index].items[place].first > last:
            return 0
        edge = self.at(last)
        if self.chunks[index].items[place].first < first or edge != NULL and edge.last > last:
            return -ERANGE
        while index < self.length:
            chunk = self.chunks[index]
            if chunk.items[place].first > last:
                break
            end = place
            while end < chunk.count and chunk.items[end].first <= last:
                end += 1
            removed += end - place
            memmove(&chunk.items[place], &chunk.items[end], (chunk.count - end) * sizeof(Mapping))
            chunk.count -= end - place
            if chunk.count == 0:
                self._drop_chunk(index)
                place = 0
            elif place == chunk.count:
                index += 1
                place = 0
            else:
                break  # the rest of the chunk is behind ``last``
        self.count -= removed
        # What became sparse is where the removal began or ended.
        self._join(index)
        if index:
            self._join(index - 1)
        if index > 1:
            self._join(index - 2)
        return removed

    # -- chunks -----------------------------------------------------------------------------------

    cdef uint32_t _chunk(self, uint64_t iova) noexcept nogil:
        """The first chunk that has a mapping which ends at ``iova`` or behind it; else ``length``."""
        cdef uint32_t low = 0, high = self.length, middle
        while low < high:
            middle = (low + high) // 2
            if self.chunks[middle].items[self.chunks[middle].count - 1].last < iova:
                low = middle + 1
            else:
                high = middle
        return low

    cdef int _insert_chunk(self, uint32_t index, Chunk *chunk) noexcept nogil:
        cdef uint32_t capacity
        cdef void *larger
        if self.length == self.capacity:
            capacity = self.capacity * 2 if self.capacity else FIRST_CAPACITY
            larger = realloc(self.chunks, capacity * sizeof(Chunk *))
            if larger == NULL:
                return -ENOMEM
            self.chunks, self.capacity = <Chunk **>larger, capacity
        memmove(&self.chunks[index + 1], &self.chunks[index], (self.length - index) * sizeof(Chunk *))
        self.chunks[index] = chunk
        self.length += 1
        return 0

    cdef int _split(self, uint32_t index) noexcept nogil:
        """Move the upper half of a full chunk to a new one behind it."""
        cdef Chunk *upper = <Chunk *>malloc(sizeof(Chunk))
        cdef Chunk *lower = self.chunks[index]
        if upper == NULL or self._insert_chunk(index + 1, upper) < 0:
            free(upper)
            return -ENOMEM
        upper.count = CHUNK // 2
        lower.count = CHUNK - CHUNK // 2
        memcpy(upper.items, &lower.items[lower.count], upper.count * sizeof(Mapping))
        return 0

    cdef void _drop_chunk(self, uint32_t index) noexcept nogil:
        free(self.chunks[index])
        self.length -= 1
        memmove(&self.chunks[index], &self.chunks[index + 1], (self.length - index) * sizeof(Chunk *))

    cdef void _join(self, uint32_t index) noexcept nogil:
        """Put a chunk and the next into one, where both fill no more than half of it: so memory is in proportion to
        ``count`` whatever a driver adds and removes."""
        cdef Chunk *lower
        cdef Chunk *upper
        if index + 1 >= self.length:
            return
        lower, upper = self.chunks[index], self.chunks[index + 1]
        if lower.count + upper.count <= CHUNK // 2:
            memcpy(&lower.items[lower.count], upper.items, upper.count * sizeof(Mapping))
            lower.count += upper.count
            self._drop_chunk(index + 1)

    # -- the Python face --------------------------------------------------------------------------

    def map(self, uint64_t first, uint64_t last, uint64_t gpa, uint32_t access):
        """0, or a negative errno: see ``add``."""
        return self.add(first, last, gpa, access)

    def unmap(self, uint64_t first, uint64_t last):
        """How many were removed, or a negative errno: see ``remove``."""
        return self.remove(first, last)

    def find(self, uint64_t iova):
        """(first, last, gpa, access) of the mapping around ``iova``, or None."""
        cdef Mapping *found = self.at(iova)
        return None if found == NULL else (found.first, found.last, found.gpa, found.access)

    def __iter__(self):
        """(first, last, gpa, access) of each, ascending; of a copy."""
        cdef uint32_t index, place
        cdef Mapping *item
        found = []
        for index in range(self.length):
            for place in range(self.chunks[index].count):
                item = &self.chunks[index].items[place]
                found.append((item.first, item.last, item.gpa, item.access))
        return iter(found)

    @property
    def chunk_count(self):
        """How many chunks hold them."""
        return self.length


cdef uint32_t _place(Chunk *chunk, uint64_t iova) noexcept nogil:
    """The first mapping of a chunk that ends at ``iova`` or behind it; there is one."""
    cdef uint32_t low = 0, high = chunk.count - 1, middle
    while low < high:
        middle = (low + high) // 2
        if chunk.items[middle].last < iova:
            low = middle + 1
        else:
            high = middle
    return low

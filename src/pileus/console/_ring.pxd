"""A bounded queue of bytes. The caller brings the storage and the lock."""

from libc.stdint cimport uint8_t
from libc.string cimport memcpy


cdef struct Ring:
    uint8_t *bytes
    size_t size
    size_t head     # index of the oldest byte
    size_t count


cdef inline void ring_init(Ring *ring, uint8_t *storage, size_t size) noexcept nogil:
    ring.bytes = storage
    ring.size = size
    ring.head = ring.count = 0


cdef inline size_t ring_write(Ring *ring, const uint8_t *data, size_t length) noexcept nogil:
    """Append as much of ``data`` as there is room for; return how much that was."""
    cdef size_t tail = (ring.head + ring.count) % ring.size, run
    length = min(length, ring.size - ring.count)
    run = min(length, ring.size - tail)
    memcpy(ring.bytes + tail, data, run)
    memcpy(ring.bytes, data + run, length - run)
    ring.count += length
    return length


cdef inline uint8_t *ring_front(Ring *ring, size_t *run) noexcept nogil:
    """The oldest bytes that lie together, ``run`` of them (all, or those before the wrap)."""
    run[0] = min(ring.count, ring.size - ring.head)
    return ring.bytes + ring.head


cdef inline void ring_skip(Ring *ring, size_t length) noexcept nogil:
    """Forget the ``length`` oldest bytes, of which there must be so many."""
    ring.count -= length
    ring.head = (ring.head + length) % ring.size if ring.count else 0


cdef inline uint8_t ring_pop(Ring *ring) noexcept nogil:
    """Take the oldest byte of a ring that is not empty."""
    cdef uint8_t byte = ring.bytes[ring.head]
    ring_skip(ring, 1)
    return byte


cdef inline bytes ring_bytes(Ring *ring):
    """A copy of all that is queued."""
    cdef size_t run = 0
    cdef uint8_t *front = ring_front(ring, &run)
    return front[:run] + ring.bytes[:ring.count - run]

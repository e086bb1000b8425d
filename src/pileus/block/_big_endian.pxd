"""Integers of an image file, in memory as they are in the file."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint16_t htobe16(uint16_t value)
    uint32_t htobe32(uint32_t value)
    uint64_t htobe64(uint64_t value)


cdef inline uint64_t load_be64(const void *table, uint64_t index) noexcept nogil:
    return be64toh((<const uint64_t *>table)[index])


cdef inline void store_be64(void *table, uint64_t index, uint64_t value) noexcept nogil:
    (<uint64_t *>table)[index] = htobe64(value)


cdef inline uint64_t load_bits(const uint8_t *data, uint64_t index, uint32_t order) noexcept nogil:
    """The entry ``index`` of a table of ``1 << order`` bits each; narrow ones begin at the lowest bit."""
    cdef uint32_t shift
    if order == 4:
        return be16toh((<const uint16_t *>data)[index])
    if order == 6:
        return be64toh((<const uint64_t *>data)[index])
    if order == 5:
        return be32toh((<const uint32_t *>data)[index])
    if order == 3:
        return data[index]
    shift = (index << order) & 7
    return (data[(index << order) >> 3] >> shift) & ((1 << (1 << order)) - 1)


cdef inline void store_bits(uint8_t *data, uint64_t index, uint32_t order, uint64_t value) noexcept nogil:
    cdef uint32_t shift
    cdef uint8_t mask
    if order == 4:
        (<uint16_t *>data)[index] = htobe16(<uint16_t>value)
    elif order == 6:
        (<uint64_t *>data)[index] = htobe64(value)
    elif order == 5:
        (<uint32_t *>data)[index] = htobe32(<uint32_t>value)
    elif order == 3:
        data[index] = <uint8_t>value
    else:
        shift = (index << order) & 7
        mask = <uint8_t>(((1 << (1 << order)) - 1) << shift)
        data[(index << order) >> 3] = (data[(index << order) >> 3] & ~mask) | (<uint8_t>(value << shift) & mask)

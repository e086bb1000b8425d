"""Packets of virtio-vsock: the header, out of and into a chain's buffers, and the payload behind it.

Source: virtio 1.2, 5.10.6 (Device Operation of the socket device)
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pileus._posix cimport iovec
from pileus.virtio.queue._queue cimport Buffers


cdef enum:
    HEADER_SIZE = 44
    HOST_CID = 2
    STREAM = 1

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7

    NO_RECEIVE = 1      # flags of SHUTDOWN, as its sender means to go on
    NO_SEND = 2
    NOTHING_MORE = 3


cdef packed struct Header:
    uint64_t src_cid
    uint64_t dst_cid
    uint32_t src_port
    uint32_t dst_port
    uint32_t length
    uint16_t type
    uint16_t op
    uint32_t flags
    uint32_t buf_alloc
    uint32_t fwd_cnt


cdef inline void header_read(Buffers *chain, Header *header) noexcept nogil:
    """Copy the header once, so that the driver cannot change what was checked; HEADER_SIZE bytes are readable."""
    cdef uint32_t got = 0, here, index = 0
    while got < HEADER_SIZE:
        here = HEADER_SIZE - got
        if chain.vectors[index].iov_len < here:
            here = <uint32_t>chain.vectors[index].iov_len
        memcpy(<uint8_t *>header + got, chain.vectors[index].iov_base, here)
        got += here
        index += 1


cdef inline void header_write(Buffers *chain, const Header *header) noexcept nogil:
    """Copy the header to the front of the writable bytes; there are HEADER_SIZE at least."""
    cdef uint32_t done = 0, here, index = chain.readable
    while done < HEADER_SIZE:
        here = HEADER_SIZE - done
        if chain.vectors[index].iov_len < here:
            here = <uint32_t>chain.vectors[index].iov_len
        memcpy(chain.vectors[index].iov_base, <const uint8_t *>header + done, here)
        done += here
        index += 1


cdef inline uint32_t cut(const iovec *vectors, uint64_t skip, uint64_t length, iovec *out) noexcept nogil:
    """Name in ``out`` the ``length`` bytes of ``vectors`` behind the first ``skip``; returns how many it took.

    The vectors hold that much, and ``out`` has room for as many.
    """
    cdef uint32_t count = 0
    cdef uint64_t here
    while length:
        if skip >= vectors.iov_len:
            skip -= vectors.iov_len
        else:
            here = vectors.iov_len - skip
            if here > length:
                here = length
            out[count].iov_base = <uint8_t *>vectors.iov_base + skip
            out[count].iov_len = here
            count += 1
            length -= here
            skip = 0
        vectors += 1
    return count

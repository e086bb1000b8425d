"""The connections of a virtio-vsock device: by slot, by pair of ports, those with news, those with deadlines.

Plain structs of one thread, so that the muxer goes about without the GIL. What a connection keeps is bounded:
its struct, its socket, and up to BUFFER bytes that its client has no room for.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset
from posix.unistd cimport close

from pileus._posix cimport iovec

cdef enum:
    FIRST_PORT = 1 << 30    # of those on the host's side of connections that the host began
    PAST_PORTS = 1 << 31
    FIRST_CAPACITY = 4096
    FIRST_WINDOW = 2


cdef void table_init(Table *table) noexcept nogil:
    cdef uint32_t index
    memset(table, 0, sizeof(Table))
    for index in range(MAX_CONNECTIONS):
        table.spare[index] = <uint16_t>(MAX_CONNECTIONS - 1 - index)
    table.spares = MAX_CONNECTIONS
    table.next_port = FIRST_PORT
    table.ready.before = table.ready.after = &table.ready
    for index in range(TIMERS):
        table.timers[index].before = table.timers[index].after = &table.timers[index]


cdef Connection *table_add(Table *table, int fd) noexcept nogil:
    cdef Connection *connection
    if table.spares == 0:
        return NULL
    connection = <Connection *>calloc(1, sizeof(Connection))
    if connection == NULL:
        return NULL
    table.spares -= 1
    table.generation += 1
    if table.generation == 0:
        table.generation = 1  # 0 is for what is no connection
    connection.slot, connection.generation = table.spare[table.spares], table.generation
    connection.ready.owner = connection.timer.owner = connection
    connection.fd = fd
    connection.window = FIRST_WINDOW
    table.slots[connection.slot] = connection
    return connection


cdef void table_remove(Table *table, Connection *connection) noexcept nogil:
    table_unhash(table, connection)
    link_remove(&connection.ready)
    link_remove(&connection.timer)
    table.slots[connection.slot] = NULL
    table.spare[table.spares] = <uint16_t>connection.slot
    table.spares += 1
    if connection.fd >= 0:
        close(connection.fd)
    free(connection.data)
    free(connection)


cdef Connection *table_at(Table *table, uint32_t slot, uint32_t generation) noexcept nogil:
    cdef Connection *connection
    if slot >= MAX_CONNECTIONS:
        return NULL
    connection = table.slots[slot]
    return connection if connection != NULL and connection.generation == generation else NULL


# -- by ports -----------------------------------------------------------------------------------------


cdef uint32_t _bucket(uint32_t host_port, uint32_t guest_port) noexcept nogil:
    return ((host_port * <uint32_t>0x9E3779B1) ^ (guest_port * <uint32_t>0x85EBCA6B)) >> 21


cdef void table_hash(Table *table, Connection *connection) noexcept nogil:
    cdef uint32_t bucket = _bucket(connection.host_port, connection.guest_port)
    connection.next, table.buckets[bucket] = table.buckets[bucket], connection
    connection.hashed = True


cdef void table_unhash(Table *table, Connection *connection) noexcept nogil:
    cdef Connection **place
    if connection.hashed:
        place = &table.buckets[_bucket(connection.host_port, connection.guest_port)]
        while place[0] != connection:
            place = &place[0].next
        place[0] = connection.next
        connection.hashed = False


cdef Connection *table_find(Table *table, uint32_t host_port, uint32_t guest_port) noexcept nogil:
    cdef Connection *connection = table.buckets[_bucket(host_port, guest_port)]
    while connection != NULL and (connection.host_port != host_port or connection.guest_port != guest_port):
        connection = connection.next
    return connection


cdef uint32_t table_port(Table *table, uint32_t guest_port) noexcept nogil:
    """There are more ports than connections, so one is free; and the one just freed is not the next."""
    cdef uint32_t port
    while True:
        port = table.next_port
        table.next_port += 1
        if table.next_port == PAST_PORTS:
            table.next_port = FIRST_PORT
        if table_find(table, port, guest_port) == NULL:
            return port


# -- deadlines ----------------------------------------------------------------------------------------


cdef void timer_set(Table *table, Connection *connection, int kind, int64_t now) noexcept nogil:
    link_remove(&connection.timer)
    connection.deadline = now + table.durations[kind]
    link_append(&table.timers[kind], &connection.timer)


cdef void timers_shift(Table *table, int64_t by) noexcept nogil:
    cdef Link *link
    cdef int kind
    for kind in range(TIMERS):
        link = table.timers[kind].after
        while link != &table.timers[kind]:
            (<Connection *>link.owner).deadline += by
            (<Connection *>link.owner).since += by
            link = link.after


cdef int64_t timer_next(Table *table) noexcept nogil:
    cdef int64_t soonest = -1
    cdef Connection *first
    cdef int kind
    for kind in range(TIMERS):
        first = link_first(&table.timers[kind])
        if first != NULL and (soonest < 0 or first.deadline < soonest):
            soonest = first.deadline
    return soonest


# -- what a client has no room for --------------------------------------------------------------------


cdef bint buffer_add(Connection *connection, const iovec *vectors, uint64_t skip, uint32_t length) noexcept nogil:
    cdef uint32_t capacity = connection.capacity
    cdef uint64_t here
    cdef uint8_t *larger
    if connection.start:
        memmove(connection.data, connection.data + connection.start, connection.length)
        connection.start = 0
    if connection.length + length > capacity:
        capacity = capacity or FIRST_CAPACITY
        while capacity < connection.length + length:
            capacity *= 2
        larger = <uint8_t *>realloc(connection.data, capacity)
        if larger == NULL:
            return False
        connection.data, connection.capacity = larger, capacity
    while length:
        if skip >= vectors.iov_len:
            skip -= vectors.iov_len
        else:
            here = vectors.iov_len - skip
            if here > length:
                here = length
            memcpy(connection.data + connection.length, <uint8_t *>vectors.iov_base + skip, here)
            connection.length += <uint32_t>here
            length -= <uint32_t>here
            skip = 0
        vectors += 1
    return True


cdef void buffer_drop(Connection *connection, uint32_t length) noexcept nogil:
    connection.start += length
    connection.length -= length
    if connection.length == 0:
        free(connection.data)
        connection.data = NULL
        connection.start = connection.capacity = 0

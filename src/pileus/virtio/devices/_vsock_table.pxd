from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pileus._posix cimport iovec


cdef enum:
    MAX_CONNECTIONS = 1023
    BUCKETS = 2048
    BUFFER = 256 << 10      # bytes that a guest may have under way to one connection: what buf_alloc says

cdef enum:  # state
    LINE            # a client of the host has yet to say which port it wants
    REQUESTED       # … and the guest has yet to answer
    CONNECTING      # the guest asks for a port whose listener's backlog is full
    ESTABLISHED
    CLOSING         # the host's side is gone and the guest knows; it owes us a RST
    LINGERING       # the guest's side is gone, what it sent has yet to reach the client

cdef enum:  # timer
    LINE_TIMER
    GUEST_TIMER
    RETRY_TIMER
    LINGER_TIMER
    TIMERS

cdef enum:  # pending: what is to be told to the guest, beside data
    TELL_RESPONSE = 1
    TELL_REQUEST = 2
    TELL_SHUTDOWN = 4
    ASK_CREDIT = 8
    TELL_CREDIT = 16


cdef struct Link:           # of a ring whose head owns nothing
    Link *before
    Link *after             # NULL: in no ring
    void *owner


cdef struct Connection:
    Connection *next        # in its bucket
    Link ready              # has something for the guest
    Link timer
    int64_t deadline        # ns
    int64_t since           # ns, when the guest asked
    uint32_t slot
    uint32_t generation     # tells it from others that had the slot
    int fd
    uint32_t host_port
    uint32_t guest_port
    int state
    bint hashed             # packets of the guest find it
    uint32_t pending
    bint readable           # as far as is known, there is something to read
    bint hung_up            # the client takes nothing any more, and sends nothing but what is there
    bint ended              # the client's data is all read
    bint deaf               # the client refuses data
    bint watches_room       # epoll tells when the client has room
    uint8_t guest_shut      # flags of SHUTDOWN that the guest sent
    uint8_t host_shut       # … and that we did
    uint32_t window         # chains that the next read gets
    # Bytes to the guest: what it takes, what it says it took, what was sent. All counts are modulo 2^32.
    uint32_t peer_alloc
    uint32_t peer_taken
    uint32_t sent
    bint asked              # for credit
    # Bytes from the guest: what came, what the client has, and what of that the guest knows.
    uint32_t received
    uint32_t forwarded
    uint32_t told
    # What the client had no room for.
    uint8_t *data
    uint32_t start
    uint32_t length
    uint32_t capacity


cdef struct Table:
    Connection *slots[MAX_CONNECTIONS]
    uint16_t spare[MAX_CONNECTIONS]
    uint32_t spares
    uint32_t generation
    Connection *buckets[BUCKETS]
    Link ready
    Link timers[TIMERS]
    int64_t durations[TIMERS]   # ns
    uint32_t next_port


cdef void table_init(Table *table) noexcept nogil
# A connection over fd in no state yet; NULL where there are too many.
cdef Connection *table_add(Table *table, int fd) noexcept nogil
# Forget it: closes its fd, frees it.
cdef void table_remove(Table *table, Connection *connection) noexcept nogil
cdef void table_hash(Table *table, Connection *connection) noexcept nogil
cdef void table_unhash(Table *table, Connection *connection) noexcept nogil
cdef Connection *table_find(Table *table, uint32_t host_port, uint32_t guest_port) noexcept nogil
# A host port that no connection to this guest port has.
cdef uint32_t table_port(Table *table, uint32_t guest_port) noexcept nogil
cdef Connection *table_at(Table *table, uint32_t slot, uint32_t generation) noexcept nogil

# Each kind's timers run equally long, so a ring is in the order of their ends.
cdef void timer_set(Table *table, Connection *connection, int kind, int64_t now) noexcept nogil
cdef void timers_shift(Table *table, int64_t by) noexcept nogil
cdef int64_t timer_next(Table *table) noexcept nogil        # ns; -1: none

# Keep bytes that the client has no room for; false without memory. BUFFER bounds it: the caller counts credit.
cdef bint buffer_add(Connection *connection, const iovec *vectors, uint64_t skip, uint32_t length) noexcept nogil
cdef void buffer_drop(Connection *connection, uint32_t length) noexcept nogil


cdef inline void link_append(Link *head, Link *link) noexcept nogil:
    """Put ``link`` at the end, unless it is in a ring."""
    if link.after == NULL:
        link.after, link.before = head, head.before
        head.before.after = link
        head.before = link


cdef inline void link_remove(Link *link) noexcept nogil:
    if link.after != NULL:
        link.before.after, link.after.before = link.after, link.before
        link.before = link.after = NULL


cdef inline Connection *link_first(Link *head) noexcept nogil:
    return NULL if head.after == head else <Connection *>head.after.owner


cdef inline uint32_t credit(const Connection *connection) noexcept nogil:
    """Bytes that the guest takes now; none from one that claims what was never sent."""
    cdef uint32_t under_way = connection.sent - connection.peer_taken
    return connection.peer_alloc - under_way if under_way < connection.peer_alloc else 0

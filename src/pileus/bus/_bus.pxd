from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef class Device:
    cdef readonly uint64_t accesses     # of guests through a bus, and the time they took
    cdef readonly uint64_t busy_ns
    # Both return 0, or -1 when a Python device raised; the exception then waits in ``error``.
    # ``data`` holds ``size`` bytes (1 to 8), little endian; a read arrives filled with ones.
    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil
    cdef int bus_write(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil


cdef class PythonDevice(Device):
    cdef readonly object error


cdef struct Range:
    uint64_t base
    uint64_t last
    void *device    # borrowed: Bus.ranges or Bus.retired holds the reference


cdef struct Table:
    size_t count
    size_t capacity
    Table *older    # outgrown tables stay readable until the bus goes
    Range ranges[1]


cdef class Bus:
    cdef readonly str name
    cdef Table *table
    cdef uint64_t sequence  # odd while the table is being written
    cdef dict ranges    # base -> (size, device): what the table was made from
    cdef list retired   # removed devices, kept alive while a vCPU may still be inside them

    cdef _publish(self)
    cdef bint _look_up(self, uint64_t address, uint32_t size, Range *found) noexcept nogil
    cdef int read(self, uint64_t address, uint8_t *data, uint32_t size) noexcept nogil
    cdef int write(self, uint64_t address, const uint8_t *data, uint32_t size) noexcept nogil

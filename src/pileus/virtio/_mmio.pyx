"""The two registers of virtio-mmio that a driver touches on every interrupt, answered without the GIL.

The interrupt status always says that a ring may have news. A driver that looks in vain loses nothing, and so
an engine, or a vhost-user backend in another process, need only signal an irqfd.

Source: virtio 1.2, 4.2.2 (MMIO Device Register Layout)
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pileus.bus._bus cimport PythonDevice

cdef enum:
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    USED_BUFFER = 1
    CONFIG_CHANGE = 2


cdef extern from *:
    """
    #define pileus_or_u32(place, bits) ((void)__atomic_fetch_or((place), (bits), __ATOMIC_ACQ_REL))
    #define pileus_and_u32(place, bits) ((void)__atomic_fetch_and((place), (bits), __ATOMIC_ACQ_REL))
    #define pileus_load_u32(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
    """
    void or_u32 "pileus_or_u32"(uint32_t *place, uint32_t bits) nogil
    void and_u32 "pileus_and_u32"(uint32_t *place, uint32_t bits) nogil
    uint32_t load_u32 "pileus_load_u32"(uint32_t *place) nogil


cdef class MmioWindow(PythonDevice):
    """The registers of one device; a subclass has the others, in ``read`` and ``write``."""

    def set_config_pending(self, pending):
        """Whether the interrupt status says that the configuration changed."""
        if pending:
            or_u32(&self.config_pending, CONFIG_CHANGE)
        else:
            and_u32(&self.config_pending, 0)

    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint32_t status
        if offset == INTERRUPT_STATUS and size == 4:
            status = USED_BUFFER | load_u32(&self.config_pending)
            memcpy(data, &status, 4)
            return 0
        return PythonDevice.bus_read(self, offset, data, size)

    cdef int bus_write(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint32_t value
        if offset == INTERRUPT_ACK and size == 4:
            memcpy(&value, data, 4)
            and_u32(&self.config_pending, ~(value & CONFIG_CHANGE))
            return 0
        return PythonDevice.bus_write(self, offset, data, size)

"""Reads of configuration space, and the address port, without the GIL.

A guest's kernel reads some 200 registers of each function before it uses it, two exits each; it writes few. So
reads are served here from the bytes of ``ConfigSpace``, and writes, with what they set off, in Python.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pileus.bus._bus cimport PythonDevice

cdef enum:
    SPACE = 256
    ADDRESS_PORT = 0
    DATA_PORT = 4
    PORTS = 8
    BUS_SHIFT = 20
    FUNCTION_SHIFT = 12

cdef uint32_t ENABLE = 1u << 31
cdef uint32_t BUS_NUMBER = 0xFF0000
cdef uint32_t WRITABLE = 0x80FFFFFC


cdef class ConfigTable:
    """Where the configuration space of each function of bus 0 is in memory."""

    def __cinit__(self):
        self.kept = []

    def add(self, devfn, bytearray data not None, bytearray slow not None):
        """``data`` are the registers; where ``slow`` is not zero, Python is to be asked."""
        if len(data) != SPACE or len(slow) != SPACE or not 0 <= devfn < SPACE:
            raise ValueError(f"function {devfn} with {len(data)} and {len(slow)} bytes")
        self.kept += memoryview(data), memoryview(slow)
        self.slow[<uint8_t>devfn] = <uint8_t *>PyByteArray_AS_STRING(slow)
        self.data[<uint8_t>devfn] = <uint8_t *>PyByteArray_AS_STRING(data)

    cdef bint read(self, uint32_t devfn, uint64_t register, uint8_t *data, uint32_t size) noexcept nogil:
        """Whether the access was served; what does not exist reads as the ones that ``data`` came with."""
        cdef uint8_t *space = self.data[devfn & 0xFF]
        cdef uint8_t *slow = self.slow[devfn & 0xFF]
        cdef uint32_t index
        if space == NULL or register + size > SPACE:
            return True
        for index in range(size):
            if slow[register + index]:
                return False
        memcpy(data, space + register, size)
        return True


cdef class PortsFace(PythonDevice):
    """The eight ports. ``read`` and ``write`` of a subclass are asked for what is not served here."""

    def __cinit__(self, *_):
        self.table = ConfigTable()  # never None, whatever a subclass forgets

    def __init__(self, ConfigTable table not None):
        self.table = table

    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint32_t address = self.address
        if offset == ADDRESS_PORT and size == 4:
            memcpy(data, &address, 4)
            return 0
        if offset < DATA_PORT or offset + size > PORTS or not address & ENABLE or address & BUS_NUMBER:
            return 0
        if self.table.read(address >> 8 & 0xFF, (address & 0xFC) + offset - DATA_PORT, data, size):
            return 0
        return PythonDevice.bus_read(self, offset, data, size)

    cdef int bus_write(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint32_t address
        if offset == ADDRESS_PORT and size == 4:
            memcpy(&address, data, 4)
            self.address = address & WRITABLE
            return 0
        return PythonDevice.bus_write(self, offset, data, size)


cdef class EcamFace(PythonDevice):
    """Configuration space in memory, likewise."""

    def __cinit__(self, *_):
        self.table = ConfigTable()  # never None, whatever a subclass forgets

    def __init__(self, ConfigTable table not None):
        self.table = table

    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
        if offset >> BUS_SHIFT or size > 4:
            return 0
        if self.table.read(offset >> FUNCTION_SHIFT, offset & 0xFFF, data, size):
            return 0
        return PythonDevice.bus_read(self, offset, data, size)

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pileus.bus._bus cimport PythonDevice


cdef class ConfigTable:
    cdef uint8_t *data[256]     # by slot << 3 | function: 256 bytes each, NULL where there is none
    cdef uint8_t *slow[256]     # likewise: not 0 for a byte that only Python can tell
    cdef list kept              # views of all that was ever added: memory in view cannot move

    cdef bint read(self, uint32_t devfn, uint64_t register, uint8_t *data, uint32_t size) noexcept nogil


cdef class PortsFace(PythonDevice):
    cdef ConfigTable table
    cdef public uint32_t address


cdef class EcamFace(PythonDevice):
    cdef ConfigTable table

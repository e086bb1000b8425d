from libc.stdint cimport uint32_t

from pileus.bus._bus cimport PythonDevice


cdef class MmioWindow(PythonDevice):
    cdef uint32_t config_pending    # bit 1 of the interrupt status, set until the driver acknowledges it

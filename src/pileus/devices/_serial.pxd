from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pileus._posix cimport pthread_mutex_t
from pileus.bus._bus cimport Device
from pileus.console._ring cimport Ring
from pileus.console._sink cimport Sink


cdef enum:
    FIFO_SIZE = 16
    WIRE_SIZE = 4096    # bytes of input that wait for the guest before the host stops reading


cdef class Serial(Device):
    cdef pthread_mutex_t lock   # over all below; taken by vCPUs and by the control loop
    cdef readonly Sink sink
    cdef readonly int call_fd   # eventfd: written for each rising edge of the interrupt line
    cdef readonly int room_fd   # eventfd: readable when feed() is worth another try
    cdef bint starved           # feed() took less than it was given
    cdef bint thre_pending      # the transmitter became empty, and IIR did not say so yet
    cdef uint8_t line           # what IIR gave as the reason when the line was last looked at
    cdef uint8_t ier, fcr, lcr, mcr, scr
    cdef uint8_t errors         # bits of LSR that its next read clears
    cdef uint8_t deltas         # bits of MSR that its next read clears
    cdef uint16_t divisor
    cdef Ring wire              # input from the host, whose oldest bytes are the receive FIFO
    cdef Ring looped            # the receive FIFO's bytes of a loopback
    cdef Ring sending           # the transmit FIFO: empty unless the sink is full
    cdef uint8_t wire_bytes[WIRE_SIZE]
    cdef uint8_t looped_bytes[FIFO_SIZE]
    cdef uint8_t sending_bytes[FIFO_SIZE]

    cdef uint8_t _load(self, uint64_t offset) noexcept nogil
    cdef void _store(self, uint64_t offset, uint8_t value) noexcept nogil
    cdef uint8_t _receive(self) noexcept nogil
    cdef void _transmit(self, uint8_t byte) noexcept nogil
    cdef void _flush(self) noexcept nogil
    cdef void _set_ier(self, uint8_t value) noexcept nogil
    cdef void _set_fcr(self, uint8_t value) noexcept nogil
    cdef void _set_mcr(self, uint8_t value) noexcept nogil
    cdef uint8_t _take_iir(self) noexcept nogil
    cdef uint8_t _take_lsr(self) noexcept nogil
    cdef uint8_t _take_msr(self) noexcept nogil
    cdef uint8_t _modem_lines(self) noexcept nogil
    cdef size_t _depth(self) noexcept nogil
    cdef size_t _received(self) noexcept nogil
    cdef uint8_t _reason(self) noexcept nogil
    cdef bint _settle(self) noexcept nogil

"""A 16550A UART, handled on the vCPU's thread without the GIL.

Output leaves at once through a sink. The transmitter is thus always empty, and says so, unless the sink is
full: then up to 16 bytes stay in the transmit FIFO, THRE stays low, and the guest waits.

Input waits on the *wire*, of which the guest sees the oldest 16 bytes (1 without FIFOs) as its receive FIFO.
So a FIFO reset, of which a driver's probe makes several, loses no input: it clears looped bytes only.

The interrupt is edge-triggered. An edge is due when the line rises, and also when it stays high for another
reason than before: a driver that serves one reason per interrupt would else wait for ever.

Source: National Semiconductor PC16550D data sheet, 8 (Registers); the line status of an idle port as in
Cloud Hypervisor 0.3.
"""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pileus._posix cimport (
    eventfd_signal,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from pileus.bus._bus cimport Device
from pileus.console._ring cimport ring_bytes, ring_front, ring_init, ring_pop, ring_skip, ring_write
from pileus.console._sink cimport Sink

cdef enum Register:
    DATA = 0    # RBR when read, THR when written, divisor low with DLAB
    IER = 1     # divisor high with DLAB
    IIR = 2     # FCR when written
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7

cdef enum:
    IER_RECEIVED = 0x01
    IER_EMPTY = 0x02
    IER_LINE = 0x04
    IER_MODEM = 0x08
    IER_ALL = 0x0F

    IIR_MODEM = 0x00        # the reasons, most urgent last
    IIR_NONE = 0x01
    IIR_EMPTY = 0x02
    IIR_RECEIVED = 0x04
    IIR_LINE = 0x06
    IIR_TIMEOUT = 0x08      # with IIR_RECEIVED: fewer bytes than the trigger level
    IIR_REASON = 0x07
    IIR_FIFOS = 0xC0

    FCR_ENABLE = 0x01
    FCR_CLEAR_RECEIVER = 0x02
    FCR_CLEAR_TRANSMITTER = 0x04
    FCR_KEPT = 0xC9         # enable, DMA mode, trigger level

    LCR_DLAB = 0x80

    MCR_DTR = 0x01
    MCR_RTS = 0x02
    MCR_OUT1 = 0x04
    MCR_OUT2 = 0x08
    MCR_LOOP = 0x10
    MCR_ALL = 0x1F

    LSR_RECEIVED = 0x01
    LSR_OVERRUN = 0x02
    LSR_ERRORS = 0x1E
    LSR_EMPTY = 0x60        # THRE and TEMT

    MSR_CTS = 0x10
    MSR_DSR = 0x20
    MSR_RI = 0x40
    MSR_DCD = 0x80
    MSR_DELTAS = 0x0F

cdef size_t[4] TRIGGER = [1, 4, 8, 14]


cdef class Serial(Device):
    """A serial port at 8 ports. ``call_fd`` is borrowed: an irqfd of an edge-triggered GSI, or -1 for none."""

    def __cinit__(self, Sink sink not None, int call_fd=-1):
        self.sink = sink
        self.call_fd = call_fd
        self.room_fd = -1
        pthread_mutex_init(&self.lock, NULL)
        ring_init(&self.wire, self.wire_bytes, WIRE_SIZE)
        ring_init(&self.looped, self.looped_bytes, FIFO_SIZE)
        ring_init(&self.sending, self.sending_bytes, FIFO_SIZE)
        self.divisor = 12           # 9600 baud
        self.lcr = 0x03             # 8 data bits
        self.mcr = MCR_OUT2
        self.line = IIR_NONE
        self.room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    def close(self):
        """Close ``room_fd``: once no vCPU runs and no loop watches it."""
        if self.room_fd >= 0:
            os.close(self.room_fd)
            self.room_fd = -1

    def feed(self, bytes data):
        """Queue input for the guest; return how many bytes there was room for.

        After a call that took less than all, ``room_fd`` becomes readable when it is worth trying again.
        """
        cdef const uint8_t *start = data
        cdef size_t length = len(data), taken
        cdef bint edge
        with nogil:
            pthread_mutex_lock(&self.lock)
            taken = ring_write(&self.wire, start, length)
            self.starved = taken < length
            edge = self._settle()
            pthread_mutex_unlock(&self.lock)
            if edge:
                eventfd_signal(self.call_fd)
        return taken

    def output_ready(self):
        """The sink has room again: send what the guest is waiting for."""
        cdef bint edge
        with nogil:
            pthread_mutex_lock(&self.lock)
            if self.sending.count:
                self._flush()
            edge = self._settle()
            pthread_mutex_unlock(&self.lock)
            if edge:
                eventfd_signal(self.call_fd)

    def resize(self, int columns, int rows):
        """A serial line has no way to tell the guest; ``stty`` there, or ``resize``, has."""

    def state(self):
        """Registers as ints and queues as bytes. The vCPUs must be stopped."""
        return {
            "divisor": self.divisor, "ier": self.ier, "fcr": self.fcr, "lcr": self.lcr, "mcr": self.mcr,
            "scr": self.scr, "errors": self.errors, "deltas": self.deltas,
            "thre_pending": int(self.thre_pending), "wire": ring_bytes(&self.wire),
            "looped": ring_bytes(&self.looped), "sending": ring_bytes(&self.sending),
        }

    def restore(self, state):
        """Become what ``state`` says; an interrupt that is due is raised at the next access or input.

        Raises ValueError for a state that no port can be in.
        """
        cdef bytes wire = state["wire"], looped = state["looped"], sending = state["sending"]
        if len(wire) > WIRE_SIZE or len(looped) > FIFO_SIZE or len(sending) > FIFO_SIZE:
            raise ValueError(f"serial: {len(wire)}, {len(looped)} and {len(sending)} bytes are more than fit")
        self.divisor = state["divisor"] & 0xFFFF
        self.ier = state["ier"] & IER_ALL
        self.fcr = state["fcr"] & FCR_KEPT
        self.lcr = state["lcr"] & 0xFF
        self.mcr = state["mcr"] & MCR_ALL
        self.scr = state["scr"] & 0xFF
        self.errors = state["errors"] & LSR_ERRORS
        self.deltas = state["deltas"] & MSR_DELTAS
        self.thre_pending = bool(state["thre_pending"])
        self.line = IIR_NONE
        ring_init(&self.wire, self.wire_bytes, WIRE_SIZE)
        ring_init(&self.looped, self.looped_bytes, FIFO_SIZE)
        ring_init(&self.sending, self.sending_bytes, FIFO_SIZE)
        ring_write(&self.wire, wire, len(wire))
        ring_write(&self.looped, looped, len(looped))
        ring_write(&self.sending, sending, len(sending))

    # The bus: byte accesses only, as on the ISA bus of a UART; others read ones and write nothing.

    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
        cdef bint edge
        if size != 1:
            return 0
        pthread_mutex_lock(&self.lock)
        data[0] = self._load(offset)
        edge = self._settle()
        pthread_mutex_unlock(&self.lock)
        if edge:
            eventfd_signal(self.call_fd)
        return 0

    cdef int bus_write(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef bint edge
        if size != 1:
            return 0
        pthread_mutex_lock(&self.lock)
        self._store(offset, data[0])
        edge = self._settle()
        pthread_mutex_unlock(&self.lock)
        if edge:
            eventfd_signal(self.call_fd)
        return 0

    cdef uint8_t _load(self, uint64_t offset) noexcept nogil:
        if offset == DATA:
            return self.divisor & 0xFF if self.lcr & LCR_DLAB else self._receive()
        elif offset == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        elif offset == IIR:
            return self._take_iir()
        elif offset == LCR:
            return self.lcr
        elif offset == MCR:
            return self.mcr
        elif offset == LSR:
            return self._take_lsr()
        elif offset == MSR:
            return self._take_msr()
        elif offset == SCR:
            return self.scr
        return 0xFF

    cdef void _store(self, uint64_t offset, uint8_t value) noexcept nogil:
        if offset == DATA:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 | value
            else:
                self._transmit(value)
        elif offset == IER:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0x00FF | value << 8
            else:
                self._set_ier(value)
        elif offset == IIR:
            self._set_fcr(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._set_mcr(value)
        elif offset == SCR:
            self.scr = value

    cdef uint8_t _receive(self) noexcept nogil:
        if self.looped.count:
            return ring_pop(&self.looped)
        if self._received():
            return ring_pop(&self.wire)
        return 0

    cdef void _transmit(self, uint8_t byte) noexcept nogil:
        if not self.mcr & MCR_LOOP:
            if self.sending.count < self._depth():  # a byte written while THRE is low may be lost, as in hardware
                ring_write(&self.sending, &byte, 1)
            self._flush()
            return
        if self.looped.count < self._depth():
            ring_write(&self.looped, &byte, 1)
        else:
            self.errors |= LSR_OVERRUN
        self.thre_pending = True

    cdef void _flush(self) noexcept nogil:
        cdef size_t run = 0, taken
        cdef uint8_t *front
        while self.sending.count:
            front = ring_front(&self.sending, &run)
            taken = self.sink.put(front, run)
            ring_skip(&self.sending, taken)
            if taken < run:
                self.thre_pending = False
                return
        self.thre_pending = True

    cdef void _set_ier(self, uint8_t value) noexcept nogil:
        """Enabling the transmitter's interrupt raises it at once where it is empty: drivers start that way."""
        if value & ~self.ier & IER_EMPTY and not self.sending.count:
            self.thre_pending = True
        self.ier = value & IER_ALL

    cdef void _set_fcr(self, uint8_t value) noexcept nogil:
        cdef bint toggled = (value ^ self.fcr) & FCR_ENABLE
        if toggled or value & FCR_CLEAR_RECEIVER:
            self.looped.count = self.looped.head = 0
        if (toggled or value & FCR_CLEAR_TRANSMITTER) and self.sending.count:
            self.sending.count = self.sending.head = 0
            self.thre_pending = True
        self.fcr = value & FCR_KEPT if value & FCR_ENABLE else 0

    cdef void _set_mcr(self, uint8_t value) noexcept nogil:
        cdef uint8_t before = self._modem_lines(), changed
        self.mcr = value & MCR_ALL
        changed = before ^ self._modem_lines()
        if changed & MSR_RI and not before & MSR_RI:
            changed &= ~MSR_RI      # the ring indicator tells of its trailing edge only
        self.deltas |= changed >> 4

    cdef uint8_t _take_iir(self) noexcept nogil:
        cdef uint8_t reason = self._reason()
        if reason == IIR_EMPTY:
            self.thre_pending = False
        return reason | (IIR_FIFOS if self.fcr & FCR_ENABLE else 0)

    cdef uint8_t _take_lsr(self) noexcept nogil:
        cdef uint8_t value = self.errors
        self.errors = 0
        if self._received():
            value |= LSR_RECEIVED
        if not self.sending.count:
            value |= LSR_EMPTY
        return value

    cdef uint8_t _take_msr(self) noexcept nogil:
        cdef uint8_t value = self._modem_lines() | self.deltas
        self.deltas = 0
        return value

    cdef uint8_t _modem_lines(self) noexcept nogil:
        """A peer that is always there; or, looped, our own outputs."""
        cdef uint8_t lines = 0
        if not self.mcr & MCR_LOOP:
            return MSR_DCD | MSR_DSR | MSR_CTS
        if self.mcr & MCR_RTS:
            lines |= MSR_CTS
        if self.mcr & MCR_DTR:
            lines |= MSR_DSR
        if self.mcr & MCR_OUT1:
            lines |= MSR_RI
        if self.mcr & MCR_OUT2:
            lines |= MSR_DCD
        return lines

    cdef size_t _depth(self) noexcept nogil:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    cdef size_t _received(self) noexcept nogil:
        """Bytes the guest can read now. The wire is cut off while the port is looped."""
        if self.mcr & MCR_LOOP:
            return self.looped.count
        return min(self.looped.count + self.wire.count, self._depth())

    cdef uint8_t _reason(self) noexcept nogil:
        """The most urgent reason to interrupt, as IIR names it."""
        if self.ier & IER_LINE and self.errors:
            return IIR_LINE
        if self.ier & IER_RECEIVED and self._received():
            if self.fcr & FCR_ENABLE and self._received() < TRIGGER[self.fcr >> 6]:
                return IIR_RECEIVED | IIR_TIMEOUT   # nothing more is about to come: the time is always up
            return IIR_RECEIVED
        if self.ier & IER_EMPTY and self.thre_pending:
            return IIR_EMPTY
        if self.ier & IER_MODEM and self.deltas:
            return IIR_MODEM
        return IIR_NONE

    cdef bint _settle(self) noexcept nogil:
        """After any change: let the host feed on, and return whether an edge is due."""
        cdef uint8_t reason = self._reason() & IIR_REASON, before = self.line
        if self.starved and self.wire.count <= <size_t>WIRE_SIZE // 2:
            self.starved = False
            eventfd_signal(self.room_fd)
        self.line = reason
        return reason != IIR_NONE and reason != before

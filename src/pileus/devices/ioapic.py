"""The IOAPIC of a machine whose KVM has local APICs only: 24 pins, each with a message to send.

Edges do not come through here: KVM has each pin's message as the route of a GSI, and an irqfd on that GSI
delivers it (``vm.lines``). What comes is what the guest writes, and the level-triggered interrupts: a message
is sent while the line is asserted, remote IRR holds the next one back until the guest's end of interrupt, and
that sends another where the line is still asserted.

The version is 0x20, not the 82093AA's 0x11, for its EOI register: KVM lets guests suppress the broadcast of
an end of interrupt where the IOAPIC is not its own, and such guests write that register instead.

Source: Intel 82093AA I/O APIC data sheet, 3.1 and 3.2; for the EOI register, Intel I/O Controller Hub data
sheets (IO-APIC, EOIR); for the message of an entry, Intel SDM volume 3, "Message Signalled Interrupts".
"""

import _thread

from pileus.bus import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, Protocol

    class Messages(Protocol):
        """Where an entry's message goes. Called with the IOAPIC locked, from any thread."""

        def route(self, messages: "Mapping[int, tuple[int, int] | None]") -> None:
            """Edges of these pins, and ends of interrupt of their vectors, belong to these messages."""

        def signal(self, address: int, data: int) -> bool:
            """Send a message now; return whether a local APIC took it."""

        def ended(self, pin: int) -> None:
            """The guest has served the level-triggered interrupt of ``pin``."""


PINS = 24
ALL_PINS = (1 << PINS) - 1
WINDOW_SIZE = 0x1000  # bytes of MMIO
ALL_ONES = 0xFFFFFFFF

# Offsets in the window.
IOREGSEL, IOWIN, EOI = 0x00, 0x10, 0x40

# Registers behind IOWIN, by the index in IOREGSEL: two for each entry come after.
ID, VERSION, ARBITRATION, ENTRIES = 0x00, 0x01, 0x02, 0x10
ID_WRITABLE = 0x0F000000
VERSION_VALUE = (PINS - 1) << 16 | 0x20

# A redirection entry: 64 bits.
VECTOR = 0xFF
MODE_SHIFT, MODE = 8, 7 << 8
LOGICAL = 1 << 11  # destination mode
SEND_PENDING = 1 << 12  # delivery status
POLARITY = 1 << 13  # kept for the guest: a line here is asserted or not
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15  # trigger mode
MASKED = 1 << 16
EXTENDED_SHIFT, EXTENDED = 49, 0x7F << 49  # bits 14 to 8 of the destination, where CPUID offers them
DESTINATION_SHIFT, DESTINATION = 56, 0xFF << 56
WRITABLE = VECTOR | MODE | LOGICAL | POLARITY | LEVEL | MASKED | EXTENDED | DESTINATION
KEPT = WRITABLE | REMOTE_IRR
RESET_VALUE = MASKED

# Delivery modes. The rest is reserved or, as ExtINT, asks an 8259 for the vector: there is none.
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT = 0, 1, 2, 4, 5
DELIVERED = (FIXED, LOWEST_PRIORITY, SMI, NMI, INIT)

# A message: bits of its address and its data.
MSI_ADDRESS = 0xFEE00000
MSI_DESTINATION_SHIFT, MSI_EXTENDED_SHIFT, MSI_LOGICAL = 12, 5, 1 << 2
MSI_LEVEL = 1 << 15 | 1 << 14  # level-triggered, asserted


def is_level(entry: int) -> bool:
    """Whether the entry waits for ends of interrupt. An NMI and its kind are edges, whatever it says."""
    return bool(entry & LEVEL) and (entry & MODE) >> MODE_SHIFT in (FIXED, LOWEST_PRIORITY)


def message(entry: int) -> tuple[int, int] | None:
    """The (address, data) that ``entry`` sends if it is not masked; None for a mode that sends none."""
    mode = (entry & MODE) >> MODE_SHIFT
    if mode not in DELIVERED:
        return None
    address = MSI_ADDRESS | (entry & DESTINATION) >> DESTINATION_SHIFT << MSI_DESTINATION_SHIFT
    address |= (entry & EXTENDED) >> EXTENDED_SHIFT << MSI_EXTENDED_SHIFT
    address |= MSI_LOGICAL if entry & LOGICAL else 0
    return address, entry & VECTOR | mode << MODE_SHIFT | (MSI_LEVEL if is_level(entry) else 0)


class Ioapic(PythonDevice):
    """A window of registers. Accesses other than 4 bytes at a register read ones and write nothing.

    Lines are asserted, whatever their polarity, by ``set_line`` and ``latch``. Any thread may call.
    """

    name = "ioapic"

    def __init__(self, messages: "Messages") -> None:
        self._messages = messages
        self._id = 0
        self._index = 0
        self._entries = [RESET_VALUE] * PINS
        self._high = 0  # a bit for each pin that set_line asserts
        self._latched = 0  # likewise, until the end of interrupt
        self._lock = _thread.allocate_lock()

    # -- the guest's side ---------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if size == 4 and offset == IOREGSEL:
            return self._index
        if size == 4 and offset == IOWIN:
            with self._lock:
                return self._load(self._index)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        with self._lock:
            if offset == IOREGSEL:
                self._index = value & 0xFF
            elif offset == IOWIN:
                self._store(self._index, value)
            elif offset == EOI:
                self._end(value & VECTOR)

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC broadcasts that the guest has served ``vector``, which was level-triggered."""
        with self._lock:
            self._end(vector)

    # -- the devices' side --------------------------------------------------------------------------

    def set_line(self, pin: int, level: bool) -> None:
        """Assert the line of ``pin``, or no longer."""
        with self._lock:
            was_low = not self._asserted(pin)
            self._high = self._high | 1 << pin if level else self._high & ~(1 << pin)
            self._changed(pin, rising=level and was_low)

    def latch(self, pin: int) -> None:
        """Assert the line of ``pin`` until the guest's end of interrupt or ``unlatch``."""
        with self._lock:
            was_low = not self._asserted(pin)
            self._latched |= 1 << pin
            self._changed(pin, rising=was_low)

    def unlatch(self, pin: int) -> None:
        with self._lock:
            self._latched &= ~(1 << pin)

    # -- state --------------------------------------------------------------------------------------

    def state(self) -> "dict[str, Any]":
        """Registers and lines. No vCPU runs."""
        return {
            "id": self._id,
            "index": self._index,
            "entries": list(self._entries),
            "high": self._high,
            "latched": self._latched,
        }

    def restore(self, state: "dict[str, Any]") -> None:
        """Become what ``state`` says, and send what is due: local APICs are restored before.

        Raises ValueError for a state that no IOAPIC can be in.
        """
        if len(state["entries"]) != PINS:
            raise ValueError(f"ioapic: there are {PINS} entries, not {len(state['entries'])}")
        with self._lock:
            self._id = state["id"] & ID_WRITABLE
            self._index = state["index"] & 0xFF
            self._high, self._latched = state["high"] & ALL_PINS, state["latched"] & ALL_PINS
            self._entries = [_settled(entry & KEPT) for entry in state["entries"]]
            self._route(range(PINS))
            for pin in range(PINS):
                self._send_level(pin)

    # -- behind the lock ----------------------------------------------------------------------------

    def _load(self, index: int) -> int:
        if index in (ID, ARBITRATION):  # the arbitration id is loaded with the id
            return self._id
        if index == VERSION:
            return VERSION_VALUE
        pin, high = divmod(index - ENTRIES, 2)
        if not 0 <= pin < PINS:
            return 0
        return self._shown(pin) >> 32 * high & ALL_ONES

    def _shown(self, pin: int) -> int:
        """The entry with its delivery status: what is due, but no local APIC takes it."""
        return self._entries[pin] | (SEND_PENDING if self._due(pin) else 0)

    def _store(self, index: int, value: int) -> None:
        if index == ID:
            self._id = value & ID_WRITABLE
        pin, high = divmod(index - ENTRIES, 2)
        if not 0 <= pin < PINS:
            return
        writable = WRITABLE & ALL_ONES << 32 * high
        old = self._entries[pin]
        self._entries[pin] = _settled(old & ~writable | value << 32 * high & writable)
        self._route((pin,))
        self._send_level(pin)

    def _end(self, vector: int) -> None:
        ended = [
            pin
            for pin, entry in enumerate(self._entries)
            if entry & REMOTE_IRR and entry & VECTOR == vector  # only level-triggered ones have remote IRR
        ]
        for pin in ended:
            self._entries[pin] &= ~REMOTE_IRR
            self._latched &= ~(1 << pin)
        self._route(ended)
        for pin in ended:
            self._messages.ended(pin)
            self._send_level(pin)

    def _asserted(self, pin: int) -> bool:
        return bool((self._high | self._latched) >> pin & 1)

    def _due(self, pin: int) -> bool:
        entry = self._entries[pin]
        return is_level(entry) and not entry & (MASKED | REMOTE_IRR) and self._asserted(pin)

    def _changed(self, pin: int, *, rising: bool) -> None:
        """The line of ``pin`` was driven. An edge while masked is lost, as the data sheet has it."""
        entry = self._entries[pin]
        if is_level(entry):
            self._send_level(pin)
        elif rising and not entry & MASKED and (sent := message(entry)):
            self._messages.signal(*sent)

    def _send_level(self, pin: int) -> None:
        sent = message(self._entries[pin])
        if self._due(pin) and sent and self._messages.signal(*sent):
            self._entries[pin] |= REMOTE_IRR

    def _route(self, pins: "Iterable[int]") -> None:
        """Tell what the pins stand for now, all at once.

        A masked one stands for nothing. But KVM tells of the end of an interrupt only where a route has its
        vector, so that one that is masked while it is served keeps its own until then.
        """
        self._messages.route(
            {
                pin: None if entry & MASKED and not entry & REMOTE_IRR else message(entry)
                for pin, entry in ((pin, self._entries[pin]) for pin in pins)
            }
        )


def _settled(entry: int) -> int:
    """An edge has no remote IRR: guests switch to edge and back in order to clear it."""
    return entry if is_level(entry) else entry & ~REMOTE_IRR

"""MSI-X: a table of messages, a mask for each and for all, and pending bits.

Each vector owns an eventfd for its lifetime. Who wants the interrupt writes it, and knows nothing of masks:
unmasked, the eventfd is attached to a GSI that is routed to the vector's message; masked, it is not, and
what was signalled waits in it. So "pending" means "detached and readable", and KVM delivers what waits when
it is attached again.

Source: PCI Local Bus 3.0, 6.8.2 (MSI-X Capability and Table Structures).
"""

import _thread
import os
import select

from pileus.bus import PythonDevice
from pileus.pci import capability

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pileus.pci.function import Function

    class Routes(Protocol):
        """GSIs and the messages they are routed to; see ``kvm.routing``. Any thread may call."""

        def allocate(self) -> int: ...
        def free(self, gsi: int) -> None: ...
        def set(self, gsi: int, address: int, data: int) -> None: ...
        def attach(self, fd: int, gsi: int) -> None: ...
        def detach(self, fd: int, gsi: int) -> None: ...


MAX_VECTORS = 2048
ENTRY_SIZE = 16  # address (8 bytes), data (4), vector control (4)
ENTRY_WRITABLE = bytes.fromhex("fcffffffffffffff ffffffff 01000000")
ENTRY_RESET = bytes(12) + b"\x01\0\0\0"
MASKED = 1  # in vector control
ENABLE, FUNCTION_MASK = 1 << 15, 1 << 14  # in message control


class Vector:
    """``fd`` is the eventfd to write for an interrupt."""

    __slots__ = ("attached", "fd", "gsi")

    def __init__(self, fd: int, gsi: int) -> None:
        self.fd = fd
        self.gsi = gsi
        self.attached = False


class Msix:
    """``count`` vectors; a BAR shows ``table`` and ``pba``, of ``table_size`` and ``pba_size`` bytes."""

    def __init__(self, count: int, routes: "Routes") -> None:
        if not 1 <= count <= MAX_VECTORS:
            raise ValueError(f"{count} vectors: 1 to {MAX_VECTORS} are possible")
        self.table_size = count * ENTRY_SIZE
        self.pba_size = -(-count // 64) * 8
        self.table = Table(self)
        self.pba = Pba(self)
        self.vectors: list[Vector] = []
        self._routes = routes
        self._entries = bytearray(ENTRY_RESET * count)
        self._control = 0
        self._lock = _thread.allocate_lock()
        try:
            for _ in range(count):
                self._add_vector()
        except BaseException:
            self.close()
            raise

    def define(self, function: "Function", bar: int, table_offset: int, pba_offset: int) -> None:
        """Add the capability: where in BAR ``bar`` table and pending bits are."""
        body = (len(self.vectors) - 1).to_bytes(2, "little")
        body += (table_offset | bar).to_bytes(4, "little") + (pba_offset | bar).to_bytes(4, "little")
        writable = (ENABLE | FUNCTION_MASK).to_bytes(2, "little")
        offset = function.capabilities.add(capability.MSIX, body, writable) + capability.HEADER_SIZE
        config = function.config
        config.after_write(offset, 2, lambda _offset, _size: self.set_control(config.get(offset, 2)))

    def set_control(self, value: int) -> None:
        """The message control word of the capability was written."""
        with self._lock:
            self._control = value
            for index in range(len(self.vectors)):
                self._update(index)

    def read_table(self, offset: int, size: int) -> int:
        return int.from_bytes(self._entries[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Any access inside the table, also one across entries."""
        with self._lock:
            for at, byte in enumerate(value.to_bytes(size, "little"), offset):
                mask = ENTRY_WRITABLE[at % ENTRY_SIZE]
                self._entries[at] = self._entries[at] & ~mask | byte & mask
            for index in range(offset // ENTRY_SIZE, (offset + size - 1) // ENTRY_SIZE + 1):
                self._update(index)

    def read_pending(self, offset: int, size: int) -> int:
        first = 8 * offset
        detached = {
            vector.fd: index
            for index, vector in enumerate(self.vectors[first : first + 8 * size])
            if not vector.attached
        }
        poll = select.poll()
        for fd in detached:
            poll.register(fd, select.POLLIN)
        return sum(1 << detached[fd] for fd, _ in poll.poll(0))

    def close(self) -> None:
        """Give back all eventfds and GSIs."""
        for vector in self.vectors:
            if vector.attached:
                self._routes.detach(vector.fd, vector.gsi)
            self._routes.free(vector.gsi)
            os.close(vector.fd)
        self.vectors.clear()

    def state(self) -> dict[str, int | bytes | list[int]]:
        """Plain data, what is pending included. No vCPU runs."""
        pending = self.read_pending(0, self.pba_size)
        waiting = [index for index in range(len(self.vectors)) if pending >> index & 1]
        return {"control": self._control, "entries": bytes(self._entries), "pending": waiting}

    def restore(self, state: dict[str, int | bytes | list[int]]) -> None:
        """Take back ``state``. Raises ValueError if it is not one of as many vectors."""
        control, entries, pending = state["control"], state["entries"], state["pending"]
        if (
            not isinstance(control, int)
            or not isinstance(entries, bytes)
            or not isinstance(pending, list)
            or len(entries) != len(self._entries)
            or not all(0 <= index < len(self.vectors) for index in pending)
        ):
            raise ValueError("MSI-X: not a state of this function")
        self._entries[:] = entries
        for index in pending:
            os.eventfd_write(self.vectors[index].fd, 1)
        self.set_control(control)

    def _add_vector(self) -> None:
        gsi = self._routes.allocate()
        try:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._routes.free(gsi)
            raise
        self.vectors.append(Vector(fd, gsi))

    def _update(self, index: int) -> None:
        """Attach the vector as its masks and its message now say, or detach it."""
        vector, start = self.vectors[index], index * ENTRY_SIZE
        entry = int.from_bytes(self._entries[start : start + ENTRY_SIZE], "little")
        live = self._control & (ENABLE | FUNCTION_MASK) == ENABLE and not entry >> 96 & MASKED
        if live:
            self._routes.set(vector.gsi, entry & (1 << 64) - 1, entry >> 64 & 0xFFFFFFFF)
        if live != vector.attached:
            (self._routes.attach if live else self._routes.detach)(vector.fd, vector.gsi)
            vector.attached = live


class Table(PythonDevice):
    """The table, as it stands in a BAR."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        return self._msix.read_table(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._msix.write_table(offset, size, value)


class Pba(PythonDevice):
    """The pending bit array, likewise; a driver cannot write it."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        return self._msix.read_pending(offset, size)

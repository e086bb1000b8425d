"""virtio-console: a terminal of the guest, with one port and a size.

It is the Port of a :class:`~pileus.console.console.Console`: output goes to the console's sink, and chains
wait while that is full; input waits here, then at the other end, until the driver has posted buffers for it.

Source: virtio 1.2, 5.3 (Console Device)
"""

import os
import struct

from pileus.errors import GuestError
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.console import Console, Sink
    from pileus.virtio.device import State

RECEIVEQ, TRANSMITQ = 0, 1
QUEUE_SIZE = 256

F_SIZE = 1 << 0
F_EMERG_WRITE = 1 << 2

CONFIG = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
EMERG_WR = 8  # offset of a character that is output at once, before any driver is up

BACKLOG = 4096  # bytes of input that wait for buffers
CHUNK = 64 << 10  # bytes of output copied at once
MAX_CHAIN = 1 << 42  # bytes: 1024 buffers of 4 GiB
BUDGET = 1 << 20  # bytes of output per kick: a chain may name one page a thousand times


class ConsoleDevice(VirtioDevice):
    """The guest's end. ``sink`` takes output; ``room_fd`` is readable once ``feed`` is worth another try."""

    id = ids.CONSOLE
    features = F_SIZE | F_EMERG_WRITE
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, name: str, sink: "Sink") -> None:
        super().__init__(name)
        self._sink = sink
        self._input = bytearray()
        self._starved = False  # the last feed took too little
        self._sent = 0  # bytes of the first chain to transmit that the sink took
        self._held_up = False  # the sink is full
        self.config = CONFIG.pack(0, 0, 1, 0)
        self.room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        super().close()
        if self.room_fd >= 0:
            os.close(self.room_fd)
            self.room_fd = -1

    def reset(self) -> None:
        self._sent = 0
        self._held_up = False

    # -- the host's side: a Port ------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """Take input for the guest; return how many bytes there was room for."""
        with self.lock:
            taken = data[: BACKLOG - len(self._input)]
            self._input += taken
            self._starved = len(taken) < len(data)
            self.kicked(RECEIVEQ)
            return len(taken)

    def output_ready(self) -> None:
        """The sink has room again."""
        with self.lock:
            if self._held_up:
                self.kicked(TRANSMITQ)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size; 0 by 0 is one that does not tell."""
        with self.lock:
            config = CONFIG.pack(min(columns, 0xFFFF), min(rows, 0xFFFF), 1, 0)
            if config != self.config:
                self.reconfigure(config)

    # -- the driver's side ------------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        if index == RECEIVEQ:
            self._receive()
        else:
            self._transmit()

    def _receive(self) -> None:
        """Input into buffers, as far as both go. Buffers that come are of interest only while input waits."""
        queue = self.queues[RECEIVEQ]
        while self._input:
            chain = queue.pop()
            if chain is None:
                if queue.listen():
                    continue
                break
            if chain.readable_len or not chain.writable_len:
                raise GuestError("a buffer for input is device-writable only (5.3.6)")
            count = chain.write(bytes(self._input[: chain.writable_len]))
            del self._input[:count]
            queue.push_used(chain, count)
        if self._starved and len(self._input) <= BACKLOG // 2:
            self._starved = False
            os.eventfd_write(self.room_fd, 1)

    def _transmit(self) -> None:
        """Output in order; what the sink does not take now stays in the ring, with all that comes after."""
        queue = self.queues[TRANSMITQ]
        self._held_up = False
        budget = BUDGET
        for chain in queue:
            if chain.writable_len:
                raise GuestError("a buffer with output is device-readable only (5.3.6)")
            while data := chain.read(min(CHUNK, budget), self._sent):
                taken = self._sink.write(data)
                self._sent += taken
                budget -= taken
                if taken < len(data):
                    self._held_up = True
                    break
            if self._held_up or not budget:
                queue.unpop(chain)
                break
            self._sent = 0
            queue.push_used(chain, 0)
        if not budget:
            self.serve_again(TRANSMITQ)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == EMERG_WR:
            self._sink.write(data[:1])

    # -- saving -----------------------------------------------------------------------------------

    def state(self) -> "State":
        return {"input": bytes(self._input), "sent": self._sent, "config": self.config}

    def restore(self, state: "State") -> None:
        if (
            len(state["input"]) > BACKLOG
            or len(state["config"]) != CONFIG.size
            or not 0 <= state["sent"] < MAX_CHAIN
        ):
            raise ValueError(f"{self.name}: no console is in this state")
        self._input = bytearray(state["input"])
        self._sent = state["sent"]
        self.config = state["config"]


def make_console(console: "Console") -> ConsoleDevice:
    """The device whose far end is ``console``; the caller connects both."""
    return ConsoleDevice("console0", console.sink)

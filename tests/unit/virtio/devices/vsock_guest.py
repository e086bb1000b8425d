"""A guest with sockets: the driver's side of virtio-vsock in plain Python, over rings in memory.

Written from the specification alone: virtio 1.2, 5.10 (Socket Device).
"""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

from pileus.net.unix_socket import Listener
from pileus.testing import FakeDriver
from pileus.virtio import status
from pileus.virtio.devices.vsock import Vsock

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
NO_RECEIVE, NO_SEND, NOTHING_MORE = 1, 2, 3
STREAM = 1
CID, HOST = 42, 2
HEADER = Struct("<QQIIIHHIII")
RX, TX, EVENTS = range(3)
ROOM = 64 << 10  # bytes that one of the guest's sockets takes
PATIENCE = 20.0  # seconds


class Packet(NamedTuple):
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    payload: bytes = b""


class Guest:
    """A VM's kernel as far as AF_VSOCK goes. It does nothing by itself: ``step`` obeys one packet."""

    def __init__(
        self, folder: Path, *, buffer: int = 4096, buffers: int = 128, start: bool = True, **options: Any
    ) -> None:
        self.path = str(folder / "vsock")
        driver = {key: options.pop(key) for key in ("event_idx", "features", "queue_sizes") if key in options}
        self.device = Vsock("vsock0", Listener(self.path), CID, **options)
        self.driver = FakeDriver(self.device, ranges=[(0, 64 << 20)], start=False, **driver)
        self.buffer, self.buffers = buffer, buffers
        self.sockets: dict[tuple[int, int], Socket] = {}  # by the host's port and ours
        self.listeners: dict[int, deque[Socket]] = {}
        self.stray: deque[Packet] = deque()  # packets for no socket
        self.came: deque[Packet] = deque()
        self._next_port = 50000
        if start:
            self.start()

    def start(self) -> None:
        """Boot, or boot again: every socket is gone."""
        self.sockets.clear()
        self.came.clear()
        self.driver.start()
        self.offer(self.buffers)

    def start_restored(self) -> None:
        """As after ``restore``: the device is activated without having been reset."""
        self.driver.negotiate()
        self.device.restore({})
        self.driver.set_up_queues()
        self.driver.control.set_status(self.driver.status | status.DRIVER_OK)
        self.driver.serve()

    def close(self) -> None:
        self.driver.close()

    # -- packets ----------------------------------------------------------------------------------

    def offer(self, count: int = 1) -> None:
        """Give the device buffers to receive into."""
        for _ in range(count):
            self.driver.add(writable=[self.buffer], queue=RX)
        if count:
            self.driver.kick_if_wanted(RX)

    def send(
        self,
        op: int,
        host_port: int,
        port: int,
        payload: bytes = b"",
        *,
        buf_alloc: int = ROOM,
        fwd_cnt: int = 0,
        flags: int = 0,
        cid: int = CID,
        dst_cid: int = HOST,
        type: int = STREAM,
        length: int | None = None,
    ) -> None:
        length = len(payload) if length is None else length
        header = HEADER.pack(cid, dst_cid, port, host_port, length, type, op, flags, buf_alloc, fwd_cnt)
        self.send_raw(header, *([payload] if payload else []))

    def send_raw(self, *parts: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        self.driver.used(TX)
        most = self.driver.rings[TX].size // 2 - 4  # a packet takes two descriptors
        while self.driver.rings[TX].in_flight > most:
            assert time.monotonic() < deadline, "the device takes no packets"
            self.driver.wait(TX)
        self.driver.add(readable=parts, queue=TX)
        self.driver.kick_if_wanted(TX)

    def sent(self) -> None:
        """Return once the device has taken every packet."""
        self.driver.used(TX)
        while self.driver.rings[TX].in_flight:
            self.driver.wait(TX)

    def packet(self, timeout: float = PATIENCE) -> Packet:
        """The next packet of the device."""
        if not self.came:
            used = self.driver.wait(RX, timeout=timeout)
            for each in used:
                data = self.driver.read(each.head, RX)[: each.length]
                self.came.append(Packet._make((*HEADER.unpack_from(data), data[HEADER.size :])))
            self.offer(len(used))
        packet = self.came.popleft()
        assert (packet.src_cid, packet.dst_cid) == (HOST, CID)
        assert packet.length == len(packet.payload)
        return packet

    def expect(self, op: int, timeout: float = PATIENCE) -> Packet:
        packet = self.packet(timeout)
        assert packet.op == op, packet
        return packet

    def quiet(self, seconds: float = 0.1) -> bool:
        """Whether the device says nothing for a while."""
        time.sleep(seconds)
        return not self.came and self.driver.rings[RX].used_index == self.driver.rings[RX].next_used

    # -- sockets ----------------------------------------------------------------------------------

    def step(self, timeout: float = PATIENCE) -> None:
        """Obey one packet, as a kernel does."""
        packet = self.packet(timeout)
        one = self.sockets.get((packet.src_port, packet.dst_port))
        if one is not None:
            one.obey(packet)
        elif packet.op == REQUEST and packet.dst_port in self.listeners:
            one = Socket(self, packet.src_port, packet.dst_port)
            one.note_credit(packet)
            one.say(RESPONSE)
            one.connected = True
            self.listeners[packet.dst_port].append(one)
        elif packet.op == REQUEST:
            self.send(RST, packet.src_port, packet.dst_port)
        else:
            self.stray.append(packet)

    def until(self, condition: Callable[[], object]) -> None:
        """Step until ``condition``; it is looked at whenever the device said something, and now and then."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            if self.came or self.driver.rings[RX].used_index != self.driver.rings[RX].next_used:
                self.step()
            else:
                time.sleep(0.0005)

    def listen(self, port: int) -> None:
        self.listeners[port] = deque()

    def accept(self, port: int) -> "Socket":
        self.until(lambda: self.listeners[port])
        return self.listeners[port].popleft()

    def connect(self, host_port: int) -> "Socket":
        """A socket that asked for a port of the host; ``connected`` or ``reset`` in time."""
        self._next_port += 1
        one = Socket(self, host_port, self._next_port)
        one.say(REQUEST)
        return one


class Socket:
    """One connection, the guest's end. ``taken`` is all that came; ``room`` how much may lie here unread."""

    def __init__(self, guest: Guest, host_port: int, port: int, room: int = ROOM) -> None:
        self.guest, self.host_port, self.port = guest, host_port, port
        self.connected = self.was_reset = False
        self.host_shut = 0
        self.room = room
        self.data = bytearray()  # came and was not read
        self.read_count = self.came_count = self.sent_count = 0
        self.peer_alloc = self.peer_forwarded = 0
        self.unread_allowed = True
        guest.sockets[host_port, port] = self

    def say(self, op: int, payload: bytes = b"", flags: int = 0) -> None:
        self.guest.send(
            op,
            self.host_port,
            self.port,
            payload,
            flags=flags,
            buf_alloc=self.room,
            fwd_cnt=self.read_count & 0xFFFFFFFF,
        )

    def note_credit(self, packet: Packet) -> None:
        self.peer_alloc, self.peer_forwarded = packet.buf_alloc, packet.fwd_cnt

    @property
    def credit(self) -> int:
        return self.peer_alloc - ((self.sent_count - self.peer_forwarded) & 0xFFFFFFFF)

    def obey(self, packet: Packet) -> None:
        self.note_credit(packet)
        if packet.op == RESPONSE:
            self.connected = True
        elif packet.op == RST:
            self.was_reset = True
            del self.guest.sockets[self.host_port, self.port]
        elif packet.op == RW:
            assert not self.host_shut & NO_SEND, "data after the end"
            self.data += packet.payload
            self.came_count += packet.length
            assert len(self.data) <= self.room, "more than there was credit for"
        elif packet.op == SHUTDOWN:
            self.host_shut |= packet.flags
            if self.host_shut == NOTHING_MORE and not self.data:
                self.abort()
        elif packet.op == CREDIT_REQUEST:
            self.say(CREDIT_UPDATE)

    def read(self) -> bytes:
        """What is there, and the device hears that there is room again."""
        data = bytes(self.data)
        self.data.clear()
        if data:
            self.read_count += len(data)
            if not self.was_reset:
                self.say(CREDIT_UPDATE)
        return data

    def read_exactly(self, count: int) -> bytes:
        parts, left = [], count
        while left:
            self.guest.until(lambda: self.data)
            parts.append(self.read())
            left -= len(parts[-1])
        assert left == 0, "more came than was expected"
        return b"".join(parts)

    def write(self, data: bytes, most: int = 64 << 10) -> None:
        while data:
            self.guest.until(lambda: self.credit > 0 or self.was_reset)
            assert not self.was_reset
            part, data = data[: min(self.credit, most)], data[min(self.credit, most) :]
            self.sent_count += len(part)
            self.say(RW, part)

    def shutdown(self, flags: int) -> None:
        self.say(SHUTDOWN, flags=flags)

    def close(self) -> None:
        """As a kernel closes: nothing more either way, and the host's RST ends it."""
        self.shutdown(NOTHING_MORE)
        self.guest.until(lambda: self.was_reset)

    def abort(self) -> None:
        self.say(RST)
        self.was_reset = True
        del self.guest.sockets[self.host_port, self.port]


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))

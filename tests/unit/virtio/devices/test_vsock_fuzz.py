"""virtio-vsock under a guest and clients that keep no rule: nobody else is harmed."""

import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.virtio import status
from pileus.virtio.devices.vsock import BUFFER_SIZE
from tests.unit.virtio.devices.vsock_guest import HEADER, RST, RX, TX, Guest

PORT = 1234
FIRST_HOST_PORT = 1 << 30
# Ports, small numbers and limits that meet each other often.
U32 = st.sampled_from([0, 1, 2, 3, 44, 53, 1 << 16, BUFFER_SIZE, (1 << 31) - 1, (1 << 32) - 1])
HOST_PORTS = st.sampled_from([53, 54, FIRST_HOST_PORT, FIRST_HOST_PORT + 1, (1 << 32) - 1])
GUEST_PORTS = st.sampled_from([PORT, PORT + 1])
HEADERS = st.builds(
    HEADER.pack,
    st.sampled_from([42, 42, 42, 42, 42, 2, 0, (1 << 64) - 1]),
    st.sampled_from([2, 2, 2, 2, 2, 42, 0, (1 << 64) - 1]),
    GUEST_PORTS,
    HOST_PORTS,
    U32,
    st.sampled_from([1, 1, 1, 1, 1, 2, 0, 0xFFFF]),
    st.sampled_from([1, 1, 2, 2, 3, 4, 5, 5, 6, 7, 0, 8, 0xFFFF]),
    U32,
    U32,
    U32,
)
STEPS = st.one_of(
    st.tuples(st.just("packet"), st.builds(lambda *parts: b"".join(parts), HEADERS, st.binary(max_size=100))),
    st.tuples(st.just("packet"), st.binary(max_size=60)),
    st.tuples(st.just("client"), st.sampled_from([b"CONNECT 1234\n", b"CONNECT 1235\nhello", b"", b"CON"])),
    st.tuples(st.just("client"), st.binary(max_size=40)),
    st.tuples(st.just("say"), st.binary(min_size=1, max_size=3000)),
    st.tuples(st.just("shut"), st.integers(0, 2)),
    st.tuples(st.just("leave"), st.none()),
    st.tuples(st.just("buffers"), st.integers(1, 3)),
)


class Crowd:
    """Clients of the host, of whom the last one acts."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.clients: list[socket.socket] = []

    def join(self, line: bytes) -> None:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(self.guest.path)
        client.setblocking(False)
        self.clients.append(client)
        self.say(line)

    def say(self, data: bytes) -> None:
        if self.clients:
            with suppress(OSError):
                self.clients[-1].send(data)

    def shut(self, how: int) -> None:
        if self.clients:
            with suppress(OSError):
                self.clients[-1].shutdown(how)

    def leave(self) -> None:
        if self.clients:
            self.clients.pop().close()


@given(st.lists(STEPS, max_size=40), st.sampled_from([45, 100, 4096]))
@settings(max_examples=100)
def test_whatever_guest_and_clients_do_the_next_connection_works(
    steps: list[tuple[str, Any]], buffer: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        guest = Guest(Path(folder), buffer=buffer, buffers=8)
        listener.bind(f"{guest.path}_53")
        listener.listen(2)
        crowd = Crowd(guest)
        for what, value in steps:
            if what == "packet":
                guest.send_raw(*([value[:44], value[44:]] if len(value) > 44 else [value or b"\0"]))
            elif what == "client":
                crowd.join(value)
            elif what == "say":
                crowd.say(value)
            elif what == "shut":
                crowd.shut(value)
            elif what == "leave":
                crowd.leave()
            else:
                _drain(guest, value)
        while crowd.clients:
            crowd.leave()
        _works(guest)
        guest.close()


def _drain(guest: Guest, count: int) -> None:
    """Take what the device sent so far and give the buffers back; ``packet`` judges each."""
    ring = guest.driver.rings[RX]
    while count and (guest.came or ring.used_index != ring.next_used):
        packet = guest.packet()
        assert 1 <= packet.op <= 7
        assert packet.buf_alloc == (0 if packet.op == RST else BUFFER_SIZE)
        count -= 1


def _works(guest: Guest) -> None:
    """A connection of a client to a port that nothing above knew."""
    guest.listen(77)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(guest.path)
        client.settimeout(10)
        client.sendall(b"CONNECT 77\nhello")
        one = guest.accept(77)
        assert one.read_exactly(5) == b"hello"
        one.write(b"bye")
        assert client.recv(64).startswith(b"OK ")
    assert not guest.driver.status & status.NEEDS_RESET


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 1 << 17),
            st.integers(0, 1 << 17),
            st.sampled_from([0, 1, 2, 4, 7]),
        ),
        max_size=8,
    ),
    st.sampled_from([RX, TX]),
    st.integers(0, 1 << 16),
)
@settings(max_examples=60)
def test_rings_of_any_content_stop_the_device_at_most(
    descriptors: list[tuple[int, int, int, int]], queue: int, available: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        guest = Guest(Path(folder), buffers=0)
        for index, (following, gpa, length, flags) in enumerate(descriptors):
            guest.driver.write_descriptor(
                index, gpa=(gpa << 12) & 0x7FFFFFF, length=length, flags=flags, next=following, queue=queue
            )
        guest.driver.rings[queue].set_available(available)
        guest.driver.kick(queue)
        if queue == RX:
            guest.driver.add(readable=[HEADER.pack(42, 2, 1, 1, 0, 1, 5, 0, 0, 0)], queue=TX)
            guest.driver.kick(TX)
        guest.driver.reset()
        guest.driver.start()
        guest.offer(8)
        _works(guest)
        guest.close()

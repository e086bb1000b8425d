"""Messages and descriptors over a socket, and peers that are slow, gone or hostile."""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.errors import HostError, PileusError, RemoteProtocolError
from pileus.vhost_user.connection import Client, Connection, Server, close_all
from pileus.vhost_user.protocol import FRONTEND, HEADER, VERSION, Message, Request, encode

SOON = 0.05  # seconds


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A back-end's end of a channel, and the bare socket of its front-end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(ours, "the peer", FRONTEND, asks=False)
    with theirs:
        yield connection, theirs
    connection.close()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def send(sock: socket.socket, data: bytes, fds: int) -> None:
    """``data`` with so many descriptors."""
    numbers = [os.dup(sock.fileno()) for _ in range(fds)]
    socket.send_fds(sock, [data], numbers)
    close_all(numbers)


def for_ever(call: Callable[[], None]) -> None:
    while True:
        call()


def test_descriptors_come_with_their_message(pair: tuple[Connection, socket.socket]) -> None:
    connection, sock = pair
    front = Connection(sock.dup(), "the peer", FRONTEND, asks=True)
    reader, writer = os.pipe()
    front.send(Message(Request.SET_OWNER))
    front.send(Message(Request.SET_VRING_CALL, 2), [writer])
    front.send(Message(Request.SET_OWNER))
    assert connection.receive() == (Message(Request.SET_OWNER), [])
    message, fds = connection.receive()
    assert message == Message(Request.SET_VRING_CALL, 2)
    os.write(fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    assert not os.get_inheritable(fds[0])
    assert connection.receive() == (Message(Request.SET_OWNER), [])
    close_all([*fds, reader, writer])
    front.close()


def test_a_message_in_pieces_waits_for_the_rest(pair: tuple[Connection, socket.socket]) -> None:
    connection, sock = pair
    data = encode(FRONTEND, Message(Request.SET_FEATURES, 7))
    for byte in data:
        assert connection.receive_now() is None
        sock.send(bytes([byte]))
    assert connection.receive_now() == (Message(Request.SET_FEATURES, 7), [])


def test_a_silent_peer_is_not_waited_for_longer_than_allowed(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, _ = pair
    connection.allow(SOON)
    with pytest.raises(HostError, match="in time"):
        connection.receive()


def test_nor_one_that_sends_a_byte_now_and_then(pair: tuple[Connection, socket.socket]) -> None:
    """The time is for the whole."""
    connection, sock = pair
    connection.allow(SOON)
    sock.send(b"\x01")
    with pytest.raises(HostError, match="in time"):
        connection.receive()
    with pytest.raises(HostError, match="in time"):
        connection.receive()


def test_a_peer_that_does_not_read_is_not_waited_for_longer(pair: tuple[Connection, socket.socket]) -> None:
    _, sock = pair
    front = Connection(sock.dup(), "the peer", FRONTEND, asks=True)
    front.allow(SOON)
    with pytest.raises(HostError, match="in time"):
        for_ever(lambda: front.send(Message(Request.SET_CONFIG, 0, 256, 0, tail=bytes(256))))
    front.close()


def test_a_peer_that_hangs_up_is_told_of(pair: tuple[Connection, socket.socket]) -> None:
    connection, sock = pair
    send(sock, HEADER.pack(Request.SET_VRING_CALL, VERSION, 8), 1)
    sock.shutdown(socket.SHUT_RDWR)
    before = open_fds()
    with pytest.raises(HostError, match="hung up"):
        connection.receive()
    assert open_fds() == before


@pytest.mark.parametrize("count", [0, 2, 8, 9, 50, 253])
def test_descriptors_of_a_refused_message_are_closed(
    pair: tuple[Connection, socket.socket], count: int
) -> None:
    connection, sock = pair
    before = open_fds()
    send(sock, encode(FRONTEND, Message(Request.SET_VRING_CALL, 1)), count)
    with pytest.raises(RemoteProtocolError, match="descriptors"):
        connection.receive()
    assert open_fds() == before


def test_descriptors_cannot_be_piled_up_byte_by_byte(pair: tuple[Connection, socket.socket]) -> None:
    connection, sock = pair
    before = open_fds()
    for byte in encode(FRONTEND, Message(Request.SET_FEATURES, 1)):
        send(sock, bytes([byte]), 1)
    with pytest.raises(RemoteProtocolError):
        connection.receive()
    assert open_fds() == before


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.binary(max_size=80),
                st.builds(
                    lambda request, flags, size, rest: struct.pack("=III", request, flags, size) + rest,
                    st.integers(0, 50),
                    st.integers(0, 15),
                    st.sampled_from([0, 4, 8, 12, 16, 20, 24, 40, 72, 4096, 1 << 31]),
                    st.binary(max_size=80),
                ),
            ),
            st.integers(0, 10),
        ),
        max_size=8,
    )
)
def test_whatever_a_peer_sends_nothing_is_left_open(sent: list[tuple[bytes, int]]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    before = open_fds()
    connection = Connection(ours, "the peer", FRONTEND, asks=False)
    with theirs:
        for data, fds in sent:
            if data:
                send(theirs, data, fds)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(PileusError):
            for_ever(lambda: close_all(connection.receive()[1]))
        connection.close()
    assert open_fds() < before


# -- meeting --------------------------------------------------------------------------------------


def test_a_client_meets_whoever_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    client = Client(path)
    assert client.attempt() is None
    server = Server(path)
    assert server.attempt() is None
    ours = client.attempt()
    theirs = server.attempt()
    assert ours is not None
    assert theirs is not None
    ours.close()
    theirs.close()
    server.close()
    assert not os.path.exists(path)
    assert client.attempt() is None


def test_a_client_is_told_of_what_is_no_socket_for_it(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="long"):
        Client("/" + 200 * "x").attempt()
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(HostError):
            Client(path).attempt()


def test_a_server_takes_the_place_of_a_dead_one_only(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    server = Server(path)
    with pytest.raises(HostError, match="in use"):
        Server(path)
    server.close()
    Path(path).write_text("precious")
    with pytest.raises(HostError, match="in use"):
        Server(path)
    assert Path(path).read_text() == "precious"

"""virtio-vsock between a guest in memory and Unix sockets."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.virtio.devices.vsock_guest import (
    NO_SEND,
    NOTHING_MORE,
    RST,
    SHUTDOWN,
    Guest,
    Socket,
)

PORT = 1234


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))
    yield
    assert not (tmp_path / "vsock").exists()
    assert (sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))) == before


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


def client_of(guest: Guest, line: bytes = b"CONNECT 1234\n") -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(guest.path)
    client.sendall(line)
    return client


def connected(guest: Guest, port: int = PORT) -> tuple[socket.socket, Socket]:
    """A connection from the host to the guest: its two ends."""
    guest.listeners.setdefault(port, __import__("collections").deque())
    client = client_of(guest, b"CONNECT %d\n" % port)
    one = guest.accept(port)
    assert client.recv(64) == b"OK %d\n" % one.host_port
    return client, one


def listener_at(guest: Guest, port: int, backlog: int = 128) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(20)
    listener.bind(f"{guest.path}_{port}")
    listener.listen(backlog)
    return listener


def test_a_client_of_the_host_talks_to_the_guest(guest: Guest) -> None:
    client, one = connected(guest)
    assert one.host_port >> 30 == 1
    client.sendall(b"ping")
    assert one.read_exactly(4) == b"ping"
    one.write(b"pong")
    assert client.recv(64) == b"pong"
    client.close()
    guest.until(lambda: one.was_reset)
    assert one.host_shut == NOTHING_MORE


def test_the_guest_talks_to_a_listener_of_the_host(guest: Guest) -> None:
    with listener_at(guest, 53) as listener:
        one = guest.connect(53)
        guest.until(lambda: one.connected)
        host, _ = listener.accept()
        with host:
            one.write(b"ping")
            assert host.recv(64) == b"ping"
            host.sendall(b"pong")
            assert one.read_exactly(4) == b"pong"
            one.close()
            assert host.recv(64) == b""

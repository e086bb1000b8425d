"""Sockets of the host's programs to and from a guest's ports."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pileus.errors import HostError, RemoteProtocolError
from pileus.net import vsock
from tests.unit.virtio.devices.vsock_guest import Guest


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


def meanwhile(call: Callable[[], socket.socket]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_connect_gives_an_ordinary_socket(guest: Guest) -> None:
    guest.listen(1024)
    thread, results = meanwhile(lambda: vsock.connect(guest.path, 1024, timeout=20))
    one = guest.accept(1024)
    one.write(b"hello")
    thread.join()
    client = results[0]
    assert isinstance(client, socket.socket)
    with client:
        assert client.gettimeout() is None
        assert client.recv(64) == b"hello"


def test_a_port_that_nobody_listens_at_is_told(guest: Guest) -> None:
    thread, results = meanwhile(lambda: vsock.connect(guest.path, 7))
    guest.step()
    thread.join()
    assert isinstance(results[0], HostError)
    assert str(results[0]) == f"cannot connect to port 7 of the guest at {guest.path}: nothing listens there"


def test_a_guest_that_takes_its_time_is_a_timeout(guest: Guest) -> None:
    with pytest.raises(TimeoutError):
        vsock.connect(guest.path, 7, timeout=0.05)


def test_no_guest_and_something_else_are_told(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(HostError, match=r"No such file or directory$"):
        vsock.connect(path, 7)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        thread, results = meanwhile(lambda: vsock.connect(path, 7))
        peer, _ = other.accept()
        with peer:
            peer.sendall(b"HTTP/1.0 400\n")
            thread.join()
    assert isinstance(results[0], RemoteProtocolError)


def test_listen_accepts_what_the_guest_connects(guest: Guest) -> None:
    with vsock.listen(guest.path, 53) as listener:
        one = guest.connect(53)
        guest.until(lambda: one.connected)
        peer, _ = listener.accept()
        with peer:
            one.write(b"hello")
            assert peer.recv(64) == b"hello"
        assert Path(f"{guest.path}_53").stat().st_mode & 0o777 == 0o600
        with pytest.raises(HostError, match=r"Address already in use$"):
            vsock.listen(guest.path, 53)

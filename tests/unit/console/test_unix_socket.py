import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.console import Console, open_console
from pileus.errors import HostError

from .conftest import Bench


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "serial.sock")


@pytest.fixture
def console(bench: Bench, path: str) -> Iterator[Console]:
    with open_console("socket", path, name="serial", warn=bench.warnings.append) as console:
        bench.serve(console)
        yield console


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(path)
    return client


def test_bytes_go_both_ways(bench: Bench, console: Console, path: str) -> None:
    with connect(path) as client:
        client.sendall(b"uname\n")
        bench.settle()
        assert bench.port.got == b"uname\n"
        console.sink.write(b"Linux\n")
        assert client.recv(100) == b"Linux\n"


def test_without_a_client_output_is_dropped(bench: Bench, console: Console) -> None:
    assert console.sink.write(b"lost") == 4
    assert console.sink.dropped == 4
    bench.settle()
    assert bench.warnings == []


def test_a_client_may_leave_and_another_come(bench: Bench, console: Console, path: str) -> None:
    for index in range(3):
        with connect(path) as client:
            client.sendall(b"hi")
            bench.settle()
            console.sink.write(b"ho")
            assert client.recv(10) == b"ho"
        bench.settle()
        assert bench.port.got == b"hi" * (index + 1)
        console.sink.write(b"nobody hears this")
        bench.settle()


def test_a_new_client_takes_over(bench: Bench, console: Console, path: str) -> None:
    with connect(path) as first:
        bench.settle()
        with connect(path) as second:
            bench.settle()
            assert first.recv(1) == b""
            console.sink.write(b"for you")
            assert second.recv(100) == b"for you"
            second.sendall(b"x")
            bench.settle()
            assert bench.port.got == b"x"


def test_a_client_that_only_stops_sending_keeps_its_output(bench: Bench, console: Console, path: str) -> None:
    with connect(path) as client:
        client.sendall(b"date\n")
        client.shutdown(socket.SHUT_WR)
        bench.settle()
        assert bench.port.got == b"date\n"
        console.sink.write(b"today\n")
        assert client.recv(100) == b"today\n"


def test_a_client_that_does_not_read_holds_the_guest_until_it_leaves(
    bench: Bench, console: Console, path: str
) -> None:
    with connect(path):
        bench.settle()
        while console.sink.write(bytes(4096)):
            pass
        bench.settle()
        assert console.sink.write(b"x") == 0
    bench.settle()
    assert console.sink.write(b"x") == 1


def test_only_the_user_may_connect(console: Console, path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_the_socket_file_is_removed(bench: Bench, path: str) -> None:
    with open_console("socket", path) as console:
        bench.serve(console)
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_a_socket_file_that_is_no_longer_ours_stays(path: str) -> None:
    with open_console("socket", path):
        os.unlink(path)
        Path(path).write_text("someone else's")
    assert Path(path).read_text() == "someone else's"


def test_a_stale_socket_file_is_replaced(bench: Bench, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(path)
    with open_console("socket", path) as console:
        bench.serve(console)
        with connect(path):
            bench.settle()


@pytest.mark.parametrize("backlog_full", [False, True])
def test_a_live_socket_is_refused(bench: Bench, path: str, backlog_full: bool) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen(0)
        clients = [connect(path)] if backlog_full else []
        with pytest.raises(HostError, match=r"cannot listen on .*serial.sock: another process does"):
            open_console("socket", path)
        for client in clients:
            client.close()
    assert os.path.exists(path)


def test_what_is_no_socket_is_refused(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(HostError, match="it exists and is not a socket"):
        open_console("socket", path)
    assert Path(path).read_text() == "precious"


def test_a_path_that_cannot_be_bound_is_named() -> None:
    with pytest.raises(HostError, match="cannot listen for a client of console on /nowhere/x: No such"):
        open_console("socket", "/nowhere/x")


def test_a_path_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="too long"):
        open_console("socket", str(tmp_path / ("x" * 120)))

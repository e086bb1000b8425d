"""Back-pressure and loss, with real pipes, files, sockets and ptys on the other end."""

import errno
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.console import Sink
from pileus.console._sink import ONE_BYTE, PENDING_MAX, PTY, SEND, WRITE

PIPE_MAX = 64 * 1024


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    fds = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield fds
    for fd in fds:
        os.close(fd)


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def read_all(fd: int) -> bytes:
    data = b""
    while is_readable(fd) and (chunk := os.read(fd, 1 << 16)):
        data += chunk
    return data


def test_drops_and_counts_where_nobody_listens(sink: Sink) -> None:
    assert sink.write(b"hello") == 5
    assert (sink.dropped, sink.pending, sink.attached) == (5, 0, False)


def test_writes_at_once(sink: Sink, pipe: tuple[int, int]) -> None:
    sink.attach(pipe[1], WRITE)
    for byte in b"login: ":
        sink.write(bytes((byte,)))
    assert os.read(pipe[0], 100) == b"login: "
    assert not is_readable(sink.wake_fd)


def test_keeps_what_the_other_end_does_not_take_then_takes_no_more(sink: Sink, pipe: tuple[int, int]) -> None:
    sink.attach(pipe[1], WRITE)
    data = os.urandom(PIPE_MAX + PENDING_MAX + 10)
    assert sink.write(data[:PIPE_MAX]) == PIPE_MAX
    assert not is_readable(sink.wake_fd)
    assert sink.write(data[PIPE_MAX:]) == PENDING_MAX
    assert is_readable(sink.wake_fd)
    assert sink.write(b"x") == 0
    got = b""
    while sink.drain():
        got += read_all(pipe[0])
    got += read_all(pipe[0])
    assert got == data[:-10]
    assert sink.dropped == 0
    assert not is_readable(sink.wake_fd)


def test_keeps_the_order_around_the_wrap_of_its_queue(sink: Sink, pipe: tuple[int, int]) -> None:
    sink.attach(pipe[1], WRITE)
    sent = got = b""
    for index in range(40):
        data = bytes((index,)) * 7001
        sent += data[: sink.write(data)]
        got += os.read(pipe[0], 5003)
        sink.drain()
    while sink.pending:
        got += read_all(pipe[0])
        sink.drain()
    assert got + read_all(pipe[0]) == sent


def test_a_vanished_reader_is_told_once_and_forgotten(sink: Sink, pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    sink.attach(writer, WRITE)
    os.close(reader)
    assert sink.write(b"abc") == 3
    assert sink.write(b"abc") == 3
    assert is_readable(sink.wake_fd)
    assert (sink.take_error(), sink.take_error()) == (errno.EPIPE, 0)
    assert (sink.dropped, sink.attached) == (6, False)
    os.close(writer)


def test_a_full_disk_may_get_room_again(sink: Sink) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    sink.attach(full, WRITE)
    assert sink.write(b"abc") == 3
    assert sink.write(b"abc") == 3
    assert sink.take_error() == errno.ENOSPC
    assert (sink.dropped, sink.attached) == (6, True)
    os.close(full)


def test_a_socket_is_not_blocked_on_nor_made_non_blocking(sink: Sink) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink.attach(ours.fileno(), SEND)
        while sink.write(bytes(4096)):
            pass
        assert sink.pending == PENDING_MAX
        assert os.get_blocking(ours.fileno())
        theirs.close()
        assert sink.drain() == 0
        assert sink.take_error() == errno.EPIPE


def test_a_blocking_description_is_written_byte_by_byte(sink: Sink) -> None:
    reader, writer = os.pipe()
    sink.attach(writer, ONE_BYTE)
    while sink.write(bytes(4096)):
        pass
    assert os.get_blocking(writer)
    got = len(os.read(reader, 1 << 20))
    while sink.drain() or is_readable(reader):
        got += len(os.read(reader, 1 << 20))
    assert got > PENDING_MAX
    os.close(reader)
    os.close(writer)


def test_a_pty_drops_bytes_only_while_nobody_has_it_open(sink: Sink) -> None:
    master, slave = os.openpty()
    path = os.ttyname(slave)
    os.set_blocking(master, False)
    os.close(slave)
    sink.attach(master, PTY)
    assert sink.write(b"lost") == 4
    assert (sink.dropped, sink.take_error()) == (4, 0)
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY)
    while sink.write(bytes(4096)):
        pass
    assert (sink.pending, sink.dropped) == (PENDING_MAX, 4)
    os.close(slave)
    assert sink.drain() == 0
    assert (sink.dropped, sink.attached) == (4 + PENDING_MAX, True)
    os.close(master)


def test_after_detach_nothing_is_written(sink: Sink, pipe: tuple[int, int]) -> None:
    sink.attach(pipe[1], WRITE)
    sink.write(bytes(PIPE_MAX + 100))
    sink.detach()
    read_all(pipe[0])
    assert sink.drain() == 0
    sink.write(b"more")
    assert read_all(pipe[0]) == b""
    assert sink.dropped == 104


def test_threads_and_the_loop_lose_no_byte(sink: Sink, pipe: tuple[int, int]) -> None:
    """Four vCPUs write numbered bytes while the loop drains and a reader reads."""
    sink.attach(pipe[1], WRITE)
    rounds, left = 60_000, [4]

    def send(code: int) -> None:
        for _ in range(rounds):
            while not sink.write(bytes((code,))):
                pass
        left[0] -= 1

    threads = [threading.Thread(target=send, args=(code,)) for code in range(4)]
    for thread in threads:
        thread.start()
    got = b""
    while left[0] or sink.pending or is_readable(pipe[0]):
        sink.drain()
        got += read_all(pipe[0])
    for thread in threads:
        thread.join()
    assert [got.count(code) for code in range(4)] == [rounds] * 4


def test_appends_to_a_file(sink: Sink, tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        sink.attach(file.fileno(), WRITE)
        sink.write(b"one ")
        sink.write(b"two")
    sink.detach()
    assert (tmp_path / "log").read_bytes() == b"one two"

"""A pty as its users treat it: opened late, closed, opened again."""

import os
import termios
from contextlib import suppress

from pileus.console import Console, open_console
from pileus.console._sink import PENDING_MAX

from .conftest import Bench


def open_other_end(console: Console) -> int:
    assert console.path is not None
    return os.open(console.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)


def test_bytes_go_both_ways_unchanged(bench: Bench) -> None:
    with open_console("pty") as console:
        bench.serve(console)
        user = open_other_end(console)
        os.write(user, b"\x03\r\n\x04")
        bench.until(lambda: bench.port.got == b"\x03\r\n\x04")
        console.sink.write(b"a\nb\r\n")
        got = bytearray()
        os.set_blocking(user, True)
        while len(got) < 5:
            got += os.read(user, 100)
        assert got == b"a\nb\r\n"
        os.close(user)


def test_it_is_raw_without_a_client_that_says_so(bench: Bench) -> None:
    with open_console("pty") as console:
        user = open_other_end(console)
        modes = termios.tcgetattr(user)
        assert not modes[1] & termios.OPOST
        assert not modes[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        os.close(user)


def test_nobody_there_costs_nothing(bench: Bench) -> None:
    with open_console("pty") as console:
        bench.serve(console)
        bench.settle()
        for _ in range(100):
            assert console.sink.write(bytes(4096)) == 4096
        bench.settle()
        assert console.sink.dropped == 100 * 4096


def test_it_can_be_left_and_opened_again(bench: Bench) -> None:
    with open_console("pty") as console:
        bench.serve(console)
        for _ in range(3):
            user = open_other_end(console)
            os.write(user, b"hello")
            bench.until(lambda: bench.port.got == b"hello")
            bench.port.got = b""
            os.close(user)
            bench.settle()


def test_what_was_typed_before_leaving_arrives(bench: Bench) -> None:
    with open_console("pty") as console:
        bench.serve(console)
        user = open_other_end(console)
        os.write(user, b"reboot\r")
        os.close(user)
        bench.until(lambda: bench.port.got == b"reboot\r")
        bench.settle()


def test_a_user_who_does_not_read_holds_the_guest_until_he_leaves(bench: Bench) -> None:
    with open_console("pty") as console:
        bench.serve(console)
        user = open_other_end(console)
        while console.sink.write(bytes(4096)):
            pass
        bench.settle()
        assert console.sink.pending > PENDING_MAX // 2  # the kernel may have moved some on
        os.close(user)
        bench.settle()
        assert console.sink.pending == 0
        assert console.sink.write(b"x") == 1


def test_a_user_who_reads_slowly_gets_all(bench: Bench) -> None:
    with open_console("pty") as console:
        bench.serve(console)
        user = open_other_end(console)
        data = os.urandom(100_000)
        sent = console.sink.write(data)
        got = b""

        def read() -> bool:
            nonlocal got
            with suppress(BlockingIOError):
                got += os.read(user, 4096)
            return len(got) >= sent

        bench.until(read)
        assert got == data[:sent]
        os.close(user)


def test_more_input_than_the_guest_takes_waits(bench: Bench) -> None:
    bench.port.room = 3
    with open_console("pty") as console:
        bench.serve(console)
        user = open_other_end(console)
        os.write(user, b"abcdef")
        bench.until(lambda: bench.port.got == b"abc")
        os.write(user, b"ghi")
        os.close(user)
        bench.settle()
        bench.port.make_room(100)
        bench.until(lambda: bench.port.got == b"abcdefghi")
        bench.settle()

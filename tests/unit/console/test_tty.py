"""A terminal stays as it was, however the program that made it raw ends.

The program runs below a shell that leads the session, as at a user's prompt: were it the session's leader,
the kernel would reset the pty at its end and prove nothing.
"""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pileus.console._sink import PENDING_MAX
from pileus.console.terminal import Terminal
from pileus.console.tty import TtyConsole

from .conftest import Bench

CHILD = Path(__file__).with_name("tty_child.py")
PATIENCE = 20.0
LFLAG = 3
COOKED = termios.ICANON | termios.ECHO | termios.ISIG


class User:
    """Someone at a terminal, whose shell runs ``command``."""

    def __init__(self, command: str, *options: str) -> None:
        self.master, self.slave = os.openpty()
        self.before = self.modes()
        self.seen = b""
        self._shell = subprocess.Popen(
            ["setsid", "--ctty", "sh", *options, "-c", command, "sh", sys.executable, str(CHILD)],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def modes(self) -> list[object]:
        return termios.tcgetattr(self.slave)

    @property
    def is_raw(self) -> bool:
        modes = termios.tcgetattr(self.slave)
        return not modes[LFLAG] & COOKED

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def sees(self, pattern: bytes) -> re.Match[bytes]:
        """Wait until ``pattern`` is on the screen; forget what is up to there."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.seen)):
            patience = deadline - time.monotonic()
            assert select.select([self.master], [], [], max(0, patience))[0], (
                f"{pattern!r} not in {self.seen!r}"
            )
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen[match.end() :]
        return match

    def until(self, raw: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.is_raw != raw:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def leave(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self.master)
        os.close(self.slave)


FOREGROUND = '"$@"; echo "status $?"; read end'


@pytest.fixture
def user() -> Iterator[User]:
    user = User(FOREGROUND)
    yield user
    user.leave()


@pytest.fixture
def pid(user: User) -> int:
    return int(user.sees(rb"ready (\d+)")[1])


@pytest.mark.parametrize(
    ("keys", "status"),
    [(b"\x01x", 0), (b"E", 0), (b"F", 1), (b"S", 128 + signal.SIGSEGV), (b"A", 128 + signal.SIGABRT)],
    ids=["Ctrl-A x", "sys.exit", "exception", "segfault", "abort"],
)
def test_modes_are_restored_at_the_end(user: User, pid: int, keys: bytes, status: int) -> None:
    assert user.is_raw
    user.type(keys)
    user.sees(rb"status %d\r" % status)
    assert user.modes() == user.before


@pytest.mark.parametrize(
    "number", ["TERM", "HUP", "QUIT", "INT", "SEGV", "BUS", "ILL", "FPE", "ABRT", "SYS", "XCPU"]
)
def test_modes_are_restored_when_a_signal_ends_it(user: User, pid: int, number: str) -> None:
    assert user.is_raw
    signum = signal.Signals[f"SIG{number}"]
    os.kill(pid, signum)
    user.sees(rb"status %d\r" % (128 + signum))
    assert user.modes() == user.before


def test_modes_are_restored_at_exit_where_nobody_closed_the_console() -> None:
    user = User('"$@" leave; echo "status $?"; read end')
    user.sees(rb"ready")
    user.type(b"\x01x")
    user.sees(rb"status 0")
    assert user.modes() == user.before
    user.leave()


def test_output_is_raw(user: User) -> None:
    """A bare line feed moves a full-screen program down, not to the first column."""
    user.sees(rb"a\nb\r\nready")


def test_control_characters_go_to_the_guest(user: User, pid: int) -> None:
    user.type(b"\x03\x1a\x1c\x04\x13\x11\r")
    user.sees(re.escape(rb"got b'\x03\x1a\x1c\x04\x13\x11\r'"))


def test_the_escape_key_helps(user: User, pid: int) -> None:
    user.type(b"\x01h")
    user.sees(rb"Ctrl-A x +end the VM\r\n")
    user.type(b"\x01a")
    user.sees(re.escape(rb"got b'\x01'"))


def test_raw_again_after_a_stop(user: User, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    termios.tcsetattr(user.slave, termios.TCSANOW, user.before)  # type: ignore[arg-type]
    os.kill(pid, signal.SIGCONT)
    user.until(raw=True)
    user.type(b"hello")
    user.sees(rb"got b'hello'")
    os.kill(pid, signal.SIGTERM)
    user.sees(rb"status")
    assert user.modes() == user.before


def test_a_background_job_leaves_the_terminal_alone_until_it_is_foreground() -> None:
    user = User('"$@" & read line; echo "line $line"; fg; echo "status $?"; read end', "-m")
    user.sees(rb"ready")
    assert user.modes() == user.before
    user.type(b"for the shell\n")
    user.sees(rb"line for the shell")
    user.until(raw=True)
    user.type(b"for the guest")
    user.sees(rb"got b'for the guest'")
    user.type(b"\x01x")
    user.sees(rb"status 0")
    assert user.modes() == user.before
    user.leave()


def test_a_terminal_that_hangs_up_does_not_spin(bench: Bench) -> None:
    master, slave = os.openpty()
    with TtyConsole(stdin=slave, stdout=slave, warn=bench.warnings.append) as console:
        bench.serve(console)
        os.close(master)
        bench.settle()
        for _ in range(2):
            console.sink.write(b"x")
            bench.settle()
        assert bench.warnings == ["console: output is being lost: Input/output error"]
    os.close(slave)


@pytest.mark.parametrize("closed", [0, 1])
def test_a_program_may_start_without_stdin_or_stdout(bench: Bench, closed: int) -> None:
    reader, writer = os.pipe()
    fds = [reader, writer]
    os.close(fds[closed])
    with TtyConsole(stdin=reader, stdout=writer) as console:
        bench.serve(console)
        assert console.sink.write(b"x") == 1
        bench.settle()
    os.close(fds[1 - closed])


def test_input_that_is_no_terminal_is_not_read(bench: Bench) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a script's next lines")
    with TtyConsole(stdin=reader, stdout=writer) as console:
        bench.serve(console)
        bench.settle()
        assert bench.port.got == b""
    os.close(reader)
    os.close(writer)


def test_a_full_pipe_on_stdout_holds_the_guest_but_not_its_other_users(bench: Bench) -> None:
    reader, writer = os.pipe()
    with open("/dev/null") as null, TtyConsole(stdin=null.fileno(), stdout=writer) as console:
        bench.serve(console)
        while console.sink.write(bytes(4096)):
            pass
        assert os.get_blocking(writer)
        while console.sink.pending:
            os.read(reader, 1 << 20)
            bench.settle()
    os.close(reader)
    os.close(writer)


def test_a_terminal_stopped_by_ctrl_s_holds_the_guest(bench: Bench) -> None:
    master, slave = os.openpty()
    with open("/dev/null") as null, TtyConsole(stdin=null.fileno(), stdout=slave) as console:
        bench.serve(console)
        termios.tcflow(slave, termios.TCOOFF)
        while console.sink.write(bytes(4096)):
            pass
        assert console.sink.pending == PENDING_MAX
        bench.settle()
        termios.tcflow(slave, termios.TCOON)
        os.set_blocking(master, False)

        def all_read() -> bool:
            with suppress(BlockingIOError):
                os.read(master, 1 << 16)
            return not console.sink.pending

        bench.until(all_read)
    os.close(slave)
    os.close(master)


def test_a_file_on_stdout_is_appended_to(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with open(path, "wb") as file, open("/dev/null") as null:
        file.write(b"a line of the shell\n")
        file.flush()
        with TtyConsole(stdin=null.fileno(), stdout=file.fileno()) as console:
            bench.serve(console)
            console.sink.write(b"a line of the guest\n")
        file.write(b"and one more\n")
    assert path.read_bytes() == b"a line of the shell\na line of the guest\nand one more\n"


def test_a_terminal_tells_its_size() -> None:
    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    assert Terminal(slave).size() == (132, 50)
    os.close(slave)
    os.close(master)


def test_what_is_no_terminal_has_no_size() -> None:
    with open("/dev/null") as null:
        assert Terminal(null.fileno()).size() == (0, 0)


def test_only_one_terminal_can_be_raw() -> None:
    master, slave = os.openpty()
    with Terminal(slave) as terminal:
        assert terminal.raw
        with pytest.raises(OSError, match="another terminal"):
            Terminal(slave).enter_raw()
    assert not terminal.raw
    os.close(slave)
    os.close(master)

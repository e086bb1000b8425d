"""A back-end of ours as a child of the VMM: started for a device, again when it dies, and ended with it.

For the device it is a peer like another, by whose ``attempt`` a new child comes into being. The child is
given one end of a socket pair, the descriptors of its file or TAP, a pipe for its messages, which become
ours, and nothing else. It ends by itself when the other end of the socket is closed, however the VMM ends.
"""

import fcntl
import os
import select
import socket
import sys

from pileus import log
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pileus.vhost_user.devices.device import Loop

STDERR = 2
SOCKET = 3  # the number that it has for the child; its other descriptors follow
FIRST = SOCKET + 1
ABOVE = 64  # where copies are meanwhile, out of the way of those
GRACE_MS = 10_000  # for a child to finish what is under way
LAST_WORDS_MS = 1_000  # for one that has failed to end
LONGEST = 4096  # bytes of a message
READABLE = 1  # EPOLLIN
SIGKILL = 9
# No site, no environment: what a start imports costs each device milliseconds. See tests/unit/test_start.py.
CODE = """\
import os, sys
os.closerange(int(sys.argv.pop(1)), 1 << 30)
sys.path.insert(0, sys.argv.pop(1))
from pileus.cli import backend
sys.exit(backend.COMMANDS[sys.argv.pop(1)].main())
"""


class Child:
    """The command ``program`` with ``words``, in which FIRST stands for the first of ``fds``.

    It serves the device ``name``. ``done`` gives back what these are of, in the end.
    All on the thread of ``loop``.
    """

    def __init__(
        self,
        name: str,
        program: str,
        words: "Sequence[str]",
        fds: "Sequence[int]",
        loop: "Loop",
        done: "Callable[[], object]",
    ) -> None:
        self.path = program
        self._name = name
        self._words = [program, *words, "--fd", str(SOCKET), *["-v"] * log.level]
        self._fds = list(fds)
        self._loop = loop
        self._done = done
        self._pid = 0
        self._closed = False
        self._ready: socket.socket | None = None  # the connection to a child that has begun already
        self._messages = -1  # where they are read
        self._begun = b""  # of a message
        self._status = 0  # that the last child ended with, as waitpid has it

    def begin(self) -> None:
        """Start a child for the first ``attempt``, so that it gets ready meanwhile. Raises HostError."""
        self._ready = self._start()

    def attempt(self) -> "socket.socket":
        """A connection to a new child; the one before is gone. Raises HostError."""
        ready, self._ready = self._ready, None
        return ready or self._start()

    def _start(self) -> "socket.socket":
        self._log_all(self._end(0))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with theirs:
                # Neither side waits for the other: a message too many is lost.
                self._messages, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    self._pid = self._spawn(writer, [theirs.fileno(), *self._fds])
                finally:
                    os.close(writer)
        except OSError as error:
            ours.close()
            self._close_messages()
            raise HostError("start", self.path, error) from error
        self._loop.watch(self._messages, READABLE, lambda _: self._relay())
        log.info(f"{self._name}: process {self._pid} serves it")
        return ours

    def last_words(self) -> str:
        """Why the child, which was not heard of, has ended; nothing if it went as it should or lives.

        For a device that was never used: later its messages are in the log.
        """
        said = self._end(LAST_WORDS_MS).decode(errors="backslashreplace").strip()
        if not self._status:
            return ""
        code = os.waitstatus_to_exitcode(self._status)
        told = said.splitlines()[-1].removeprefix(f"{self.path}: ") if said else ""
        return told or (f"signal {-code} ended it" if code < 0 else f"it ended with status {code}")

    def close(self) -> None:
        """The connection is closed: wait for the child to end. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._ready is not None:
            self._ready.close()
        self._log_all(self._end(GRACE_MS))
        self._done()

    @property
    def pid(self) -> int:
        """Of the child, 0 where there is none."""
        return self._pid

    def _spawn(self, writer: int, fds: "list[int]") -> int:
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE) for fd in (writer, *fds)]
        try:
            actions: list[tuple[int, ...] | tuple[int, int, str, int, int]]
            actions = [(os.POSIX_SPAWN_DUP2, copy, STDERR + index) for index, copy in enumerate(copies)]
            actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
            package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            return os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", CODE, str(SOCKET + len(fds)), package, *self._words],
                {"LANG": "C.UTF-8"},
                file_actions=actions,
                setpgroup=0,  # Ctrl-C of the terminal is for the VMM to judge
                setsigmask=(),
            )
        finally:
            for copy in copies:
                os.close(copy)

    def _end(self, grace_ms: int) -> bytes:
        """Have no child any more: nothing of its work is under way when this returns. What it said last."""
        pid, self._pid = self._pid, 0
        if pid:
            self._status = _wait(pid, grace_ms)
        said, self._begun = self._begun + self._read(), b""
        self._close_messages()
        return said

    # -- messages ---------------------------------------------------------------------------------

    def _relay(self) -> None:
        *lines, self._begun = (self._begun + self._read()).split(b"\n")
        self._begun = self._begun[-LONGEST:]
        self._log_all(b"\n".join(lines))

    def _log_all(self, lines: bytes) -> None:
        for line in lines.splitlines():
            self._log(line[:LONGEST].decode(errors="backslashreplace"))

    def _log(self, line: str) -> None:
        """As ours, at the level that the child gave it."""
        head, _, text = line.partition(" -- ")
        level = next((at for at, name in enumerate(log.NAMES) if f" {name}:" in head), log.ERROR)
        text = (text or line).removeprefix(f"{self._name}: ")
        log.limited(level, f"{self._name}: its process says: {text}")

    def _read(self) -> bytes:
        """What is there; at the end of all no more is waited for."""
        if self._messages < 0:
            return b""
        try:
            data = os.read(self._messages, 1 << 16)
        except BlockingIOError:
            return b""
        if not data:
            self._close_messages()
        return data

    def _close_messages(self) -> None:
        if self._messages >= 0:
            self._loop.unwatch(self._messages)
            os.close(self._messages)
            self._messages = -1


def _wait(pid: int, grace_ms: int) -> int:
    """For ``pid`` to end, by force if it takes longer; its status, 0 where somebody else waited for it."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return 0
    try:
        watch = select.poll()
        watch.register(handle, select.POLLIN)
        if not watch.poll(grace_ms):
            os.kill(pid, SIGKILL)
        return os.waitpid(pid, 0)[1]
    except (ChildProcessError, ProcessLookupError):
        return 0
    finally:
        os.close(handle)

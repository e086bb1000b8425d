"""A back-end of ours as a child of the VMM: started for a device, again when it dies, and ended with it.

For the device it is a peer like another, by whose ``attempt`` a new child comes into being. The child is
given one end of a socket pair and the descriptors of its file or TAP, and nothing else. It ends by itself
when the other end is closed, however the VMM ends.
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

SOCKET = 3  # the number that it has for the child; its other descriptors follow
FIRST = SOCKET + 1
ABOVE = 64  # where copies are meanwhile, out of the way of those
GRACE_MS = 10_000  # for a child to finish what is under way
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

    ``done`` gives back what these are of, in the end.
    """

    def __init__(
        self, program: str, words: "Sequence[str]", fds: "Sequence[int]", done: "Callable[[], object]"
    ) -> None:
        self.path = program
        self._words = [program, *words, "--fd", str(SOCKET)]
        self._fds = list(fds)
        self._done = done
        self._pid = 0

    def attempt(self) -> "socket.socket":
        """A connection to a new child; the one before is gone. Raises HostError."""
        self._end(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with theirs:
                self._pid = self._spawn([theirs.fileno(), *self._fds])
        except OSError as error:
            ours.close()
            raise HostError("start", self.path, error) from error
        log.info(f"{self.path}: process {self._pid} is its back-end")
        return ours

    def close(self) -> None:
        """The connection is closed: wait for the child to end."""
        self._end(GRACE_MS)
        self._done()

    @property
    def pid(self) -> int:
        """Of the child, 0 where there is none."""
        return self._pid

    def _spawn(self, fds: "list[int]") -> int:
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE) for fd in fds]
        try:
            actions: list[tuple[int, ...] | tuple[int, int, str, int, int]]
            actions = [(os.POSIX_SPAWN_DUP2, copy, SOCKET + index) for index, copy in enumerate(copies)]
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

    def _end(self, grace_ms: int) -> None:
        """Have no child any more: nothing that it had under way is so when this returns."""
        pid, self._pid = self._pid, 0
        if not pid:
            return
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return  # somebody else has waited for it
        try:
            watch = select.poll()
            watch.register(handle, select.POLLIN)
            if not watch.poll(grace_ms):
                os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)
        except (ChildProcessError, ProcessLookupError):
            pass
        finally:
            os.close(handle)

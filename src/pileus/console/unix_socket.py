"""A console on a listening Unix stream socket, for one client at a time."""

import os
import socket
import stat

from pileus.console._sink import SEND
from pileus.console.console import READABLE, Console
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.console.console import Loop


class SocketConsole(Console):
    """Output to and input from the client of ``path``. While there is none, output is dropped.

    A new client takes over from the one before, as in Cloud Hypervisor: whoever lost a terminal with a
    client in it gets at the console again. A client that only stops sending keeps its output.
    """

    def __init__(self, path: str, name: str = "console", warn: "Callable[[str], None] | None" = None) -> None:
        super().__init__(name, warn)
        self.path = path
        try:
            self._listener = _listen(path)
            self._identity = _identity(path)
        except OSError as error:
            self.close()
            raise HostError(f"listen for a client of {name} on", path, error) from error
        except HostError:
            self.close()
            raise

    def start(self, loop: "Loop") -> None:
        loop.watch(self._listener.fileno(), READABLE, lambda _: self._accept())
        super().start(loop)

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.unwatch(self._listener.fileno())
        super().stop()

    def close(self) -> None:
        """Also remove the socket file, if it is still ours."""
        super().close()
        if (listener := getattr(self, "_listener", None)) is None or listener.fileno() < 0:
            return
        listener.close()
        if self.path is not None and _identity(self.path) == self._identity:
            os.unlink(self.path)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it left again, or there are no fds left
            return
        self._drop()
        client.setblocking(False)
        self._input = self._output = client.detach()
        self.sink.attach(self._output, SEND)
        self._watch()

    def _drain(self) -> None:
        super()._drain()
        if self._output >= 0 and not self.sink.attached:  # the client left while we wrote
            self._drop()

    def _drop(self) -> None:
        """Forget the client, if there is one."""
        self.sink.detach()
        self._held = b""
        fd, self._input, self._output = self._output, -1, -1
        self._watch()
        if fd >= 0:
            os.close(fd)


def _listen(path: str) -> socket.socket:
    """A listener that only this user can connect to, in place of a stale one. Raises OSError, HostError."""
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind gives the file this mode: there is no moment to slip in
        listener.bind(path)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises HostError if somebody does, or it is no socket."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise HostError("listen on", path, "it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its backlog is full
            pass
    raise HostError("listen on", path, "another process does")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino

"""A listening Unix stream socket at a path, and its file: 0600, a stale one replaced, a live one refused."""

import os
import socket
import stat

from pileus.errors import HostError


class Listener:
    """Listens at ``path``, for this user only. Raises OSError, or HostError where the path is taken."""

    def __init__(self, path: str, backlog: int = 1) -> None:
        _remove_stale(path)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # bind gives the file this mode: no moment to slip in
            self.socket.bind(path)
            self.socket.listen(backlog)
            self._identity = _identity(path)
        except OSError:
            self.socket.close()
            raise

    def fileno(self) -> int:
        """-1 once it is closed."""
        return self.socket.fileno()

    def close(self) -> None:
        """Also remove the file, if it is still ours. Closing twice is harmless."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        if self._identity is not None and _identity(self.path) == self._identity:
            os.unlink(self.path)


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

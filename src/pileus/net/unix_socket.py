"""A listening Unix stream socket whose file comes and goes with it."""

import _socket as socket  # the module itself costs a start 5 ms more
import os
import stat

from pileus.errors import HostError

BACKLOG = 1024  # the kernel cuts it to net.core.somaxconn
MODE = 0o600


class Listener:
    """Listens at ``path``, for this user only, in place of a stale socket. ``close`` removes the file.

    Raises HostError where somebody listens there, or the path is not a socket's, or the host refuses.
    """

    def __init__(self, path: str, backlog: int = BACKLOG) -> None:
        self.path = path
        try:
            _remove_stale(path)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                os.fchmod(self._socket.fileno(), MODE)  # bind gives the file this mode: no moment to slip in
                self._socket.bind(path)
                self._identity = _identity(path)
                self._socket.listen(backlog)
            except OSError:
                self._socket.close()
                raise
        except OSError as error:
            raise HostError("listen on", path, error if error.errno else str(error)) from error

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Harmless a second time; a file that another process put there meanwhile stays."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            if _identity(self.path) == self._identity:
                os.unlink(self.path)


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises HostError if somebody does, or it is no socket."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise HostError("listen on", path, "it exists and is not a socket")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except BlockingIOError:  # its backlog is full
        pass
    finally:
        probe.close()
    raise HostError("listen on", path, "another process does")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino

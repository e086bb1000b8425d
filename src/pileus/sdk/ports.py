"""A VM's vsock, for the program that runs it: ordinary sockets to and from the guest's ports."""

import os
import socket
import time
from collections.abc import Callable

from pileus.errors import HostError
from pileus.net import vsock

PATIENCE = 60.0  # seconds for a guest to listen
PAUSE = 0.05  # seconds between two attempts


class Vsock:
    """``path`` is the VM's vsock socket; ``is_alive`` whether there is still a VM to wait for."""

    def __init__(self, path: str, is_alive: Callable[[], bool]) -> None:
        self.path = path
        self._is_alive = is_alive
        self._listening: set[str] = set()

    def connect(self, port: int, timeout: float | None = PATIENCE) -> socket.socket:
        """A socket connected to ``port`` of the guest, as soon as something listens there.

        Raises HostError where nothing does within ``timeout`` seconds, or the VM is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), PAUSE)
            try:
                return vsock.connect(self.path, port, left)
            except TimeoutError:
                raise HostError(
                    f"connect to port {port} of the guest at", self.path, f"no answer in {timeout:g} s"
                ) from None
            except HostError:
                if not self._is_alive() or (deadline is not None and time.monotonic() > deadline):
                    raise
            time.sleep(PAUSE)

    def listen(self, port: int, backlog: int = vsock.BACKLOG) -> socket.socket:
        """A socket that accepts the guest's connections to ``port`` of the host. Raises HostError.

        Its file goes when the VM does.
        """
        place = f"{self.path}_{port}"
        if place in self._listening:
            _unlink(place)  # of a listener that was closed, or is given up now
        one = vsock.listen(self.path, port, backlog)
        self._listening.add(place)
        return one

    def close(self) -> None:
        """Remove the files of all listeners; the sockets are their owners'."""
        while self._listening:
            _unlink(self._listening.pop())


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass

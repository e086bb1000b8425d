"""A back-end from its socket's point of view: one front-end after the other.

``serve`` is all that a program needs which has a device of its own to offer.
"""

import os

from pileus import log
from pileus.errors import HostError
from pileus.loop import READABLE, Loop
from pileus.memory import _sigbus
from pileus.vhost_user import connection
from pileus.vhost_user.backend import Backend

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Protocol

    from pileus.virtio.device import VirtioDevice

    class Peer(Protocol):
        """A way to front-ends: Client, Server or Inherited of ``vhost_user.connection``."""

        path: str

        def fileno(self) -> int: ...
        def attempt(self) -> socket.socket | None: ...
        def close(self) -> None: ...

        @property
        def over(self) -> bool:
            """Whether nobody can come any more."""


RETRY = 0.1  # seconds between attempts to reach a front-end that listens


class BackendServer:
    """Offers ``device`` to whoever comes through ``peer``. Both are the caller's; ``close`` before them.

    ``finished`` is called when nobody can come any more. All on the thread of ``loop``.
    """

    def __init__(
        self, device: "VirtioDevice", peer: "Peer", loop: Loop, finished: "Callable[[], None]"
    ) -> None:
        self.device = device
        self._peer = peer
        self._loop = loop
        self._finished = finished
        self._backend: Backend | None = None
        self._closed = False
        self._faults = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _sigbus.tell(self._faults)
        loop.watch(self._faults, READABLE, lambda _: self._faulted())
        self._await_front_end()

    def close(self) -> None:
        """Part from the front-end, if there is one."""
        self._closed = True
        self._loop.unwatch(self._peer.fileno())
        if self._backend is not None:
            self._backend.close()
        self._loop.unwatch(self._faults)
        _sigbus.tell(-1)
        os.close(self._faults)

    def _await_front_end(self) -> None:
        if self._closed:
            return
        if self._peer.fileno() >= 0:
            self._loop.watch(self._peer.fileno(), READABLE, lambda _: self._attempt())
        else:
            self._loop.post(self._attempt)

    def _attempt(self) -> None:
        if self._closed or self._backend is not None:
            return
        try:
            sock = self._peer.attempt()
        except HostError as error:
            log.error(f"{self.device.name}: {error}")
            self._finished()
            return
        if sock is not None:
            self._loop.unwatch(self._peer.fileno())
            log.info(f"{self.device.name}: a front-end is here")
            self._backend = Backend(self.device, sock, self._loop, self._parted, self._peer.path)
        elif self._peer.fileno() < 0:
            self._loop.after(RETRY, self._attempt)

    def _parted(self) -> None:
        log.info(f"{self.device.name}: the front-end is gone")
        self._backend = None
        if self._peer.over:
            self._finished()
        else:
            self._await_front_end()

    def _faulted(self) -> None:
        os.eventfd_read(self._faults)
        if self._backend is not None:
            log.limited(log.WARNING, f"{self.device.name}: the front-end took memory away that it had shared")
            self._backend.close()


def serve(device: "VirtioDevice", path: str) -> None:
    """Offer ``device`` on a Unix socket at ``path`` until the process is interrupted. Closes the device."""
    loop = Loop()
    peer = connection.Server(path)
    server = BackendServer(device, peer, loop, loop.stop)
    try:
        loop.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
        peer.close()
        device.close()
        loop.close()

"""A console on a listening Unix stream socket, for one client at a time."""

import os

from pileus.console._sink import SEND
from pileus.console.console import READABLE, Console
from pileus.errors import HostError
from pileus.listener import Listener

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
            self._listener = Listener(path)
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
        if (listener := getattr(self, "_listener", None)) is not None:
            listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.socket.accept()
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

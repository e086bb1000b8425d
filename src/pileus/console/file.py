"""A console that is written to a file."""

import os

from pileus.console._sink import WRITE
from pileus.console.console import Console
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class FileConsole(Console):
    """Output to the file at ``path``, created or truncated at each boot of the guest; no input.

    It appends, so that a file that is shared or truncated meanwhile gets no holes. A FIFO needs a reader.
    """

    def __init__(self, path: str, name: str = "console", warn: "Callable[[str], None] | None" = None) -> None:
        super().__init__(name, warn)
        self.path = path
        try:
            self._open()
        except HostError:
            self.close()
            raise

    def restart(self) -> None:
        """Truncate the file, or begin a new one if the old one was moved away."""
        self._open()

    def _open(self) -> None:
        assert self.path is not None
        try:
            fd = os.open(self.path, FLAGS, 0o666)
        except OSError as error:
            raise HostError(f"write the output of {self.name} to", self.path, error) from error
        self.sink.attach(fd, WRITE)  # on return no vCPU writes to the old one
        old, self._output = self._output, fd
        self._watch()
        if old >= 0:
            os.close(old)

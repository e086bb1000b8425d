"""A console on a pseudo-terminal, for a terminal program to open and leave at will."""

import os
import select
import termios

from pileus.console._sink import PTY
from pileus.console.console import Console
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IFLAG, OFLAG, CFLAG, LFLAG = range(4)  # indices in what termios.tcgetattr returns


class PtyConsole(Console):
    """Output to and input from whoever opens ``path``. While nobody does, output is dropped.

    The master is watched edge-triggered: as long as the other end is closed it reports a hang-up, and only
    input after the next opening is news.
    """

    input_trigger = select.EPOLLET

    def __init__(self, name: str = "console", warn: "Callable[[str], None] | None" = None) -> None:
        super().__init__(name, warn)
        try:
            master, slave = os.openpty()
        except OSError as error:
            self.close()
            raise HostError(f"allocate a pty for {name} from", "/dev/ptmx", error) from error
        self._input = self._output = master
        self.path = os.ttyname(slave)
        _make_raw(slave)
        os.close(slave)  # from now on the master tells of a hang-up while nobody has it open
        os.set_blocking(master, False)
        self.sink.attach(master, PTY)

    @property
    def size(self) -> tuple[int, int]:
        """What its user's program has set; nothing tells us when that changes."""
        return os.get_terminal_size(self._output)

    def _read(self) -> bool:
        """Read all there is: an edge is told once."""
        while not self._held and super()._read():
            pass
        return False

    def _input_ended(self) -> None:
        """The other end was closed. Another may come."""


def _make_raw(fd: int) -> None:
    """As cfmakeraw does: so that a client that sets no modes itself is not echoed to."""
    modes = termios.tcgetattr(fd)
    modes[IFLAG] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    modes[OFLAG] &= ~termios.OPOST
    modes[CFLAG] = modes[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    modes[LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(fd, termios.TCSANOW, modes)

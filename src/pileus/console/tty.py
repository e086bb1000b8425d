"""A console on pileus's own stdin and stdout."""

import os

from pileus.console.console import READABLE, Console
from pileus.console.descriptor import own_input, own_output
from pileus.console.escape import Escape
from pileus.console.terminal import Terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.console.console import Loop

HELP = b"\r\nCtrl-A x  end the VM\r\nCtrl-A a  send Ctrl-A (or Ctrl-A twice)\r\nCtrl-A h  this help\r\n"


class TtyConsole(Console):
    """Output to ``stdout``; input from ``stdin`` if that is a terminal, raw from ``start`` to ``stop``.

    ``quit`` is called for Ctrl-A x. While another job has the terminal, it is neither read nor changed.
    """

    def __init__(
        self,
        name: str = "console",
        warn: "Callable[[str], None] | None" = None,
        quit: "Callable[[], None] | None" = None,
        stdin: int = 0,
        stdout: int = 1,
    ) -> None:
        super().__init__(name, warn)
        self._escape = Escape({ord("x"): quit or (lambda: None), ord("h"): self._help, ord("?"): self._help})
        self.terminal: Terminal | None = None
        self._hung_up = False
        if _is_open(stdout):
            self._output, mode = own_output(stdout)
            self.sink.attach(self._output, mode)
        if _is_open(stdin) and os.isatty(stdin):
            self._input = own_input(stdin)
            self.terminal = Terminal(self._input)

    def start(self, loop: "Loop") -> None:
        if self.terminal is not None and self._input >= 0:
            self.terminal.enter_raw()
            loop.watch(self.terminal.resumed_fd, READABLE, lambda _: self._resumed())
        super().start(loop)

    def stop(self) -> None:
        if self.terminal is not None and self.terminal.resumed_fd >= 0:
            if self._loop is not None:
                self._loop.unwatch(self.terminal.resumed_fd)
            self.terminal.leave_raw()
        super().stop()

    @property
    def size(self) -> tuple[int, int]:
        return (0, 0) if self.terminal is None else self.terminal.size()

    def _wanted(self) -> dict[int, int]:
        """Do not read in the background: it would stop the whole process. SIGCONT tells of a change."""
        wanted = super()._wanted()
        if self.terminal is not None and (self._hung_up or self.terminal.in_background):
            wanted.pop(self._input, None)
        return wanted

    def _read(self) -> bool:
        if self.terminal is not None and self.terminal.in_background:
            return False
        return super()._read()

    def _translate(self, data: bytes) -> bytes:
        return self._escape.filter(data)

    def _input_ended(self) -> None:
        """The terminal hung up. It stays open, unread, since its modes are restored through it."""
        self._hung_up = True

    def _resumed(self) -> None:
        assert self.terminal is not None
        os.eventfd_read(self.terminal.resumed_fd)
        self._watch()
        self.resized()

    def _help(self) -> None:
        self.sink.write(HELP)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

"""The user's terminal: raw while a guest has it, and as it was before on every way out."""

import atexit
import os

from pileus.console import _terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class Terminal:
    """The terminal at ``fd``, which stays the caller's.

    While raw, output is raw too: a line of our own for that terminal must end in CR LF. ``resumed_fd`` is
    readable after the process was stopped and continued; raw mode is then already set again.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.resumed_fd = -1

    def __enter__(self) -> "Self":
        self.enter_raw()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave_raw()

    def enter_raw(self) -> None:
        """Make it raw: at once, or when the process gets into the foreground.

        Raises OSError if another terminal of this process is raw.
        """
        resumed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            _terminal.enter_raw(self.fd, resumed_fd)
        except OSError:
            os.close(resumed_fd)
            raise
        self.resumed_fd = resumed_fd
        atexit.register(_terminal.leave_raw)

    def leave_raw(self) -> None:
        """Restore the modes it had. Doing so twice is harmless."""
        if self.resumed_fd >= 0:
            _terminal.leave_raw()
            atexit.unregister(_terminal.leave_raw)
            os.close(self.resumed_fd)
            self.resumed_fd = -1

    @property
    def raw(self) -> bool:
        return self.resumed_fd >= 0 and _terminal.is_raw()

    @property
    def in_background(self) -> bool:
        """Whether another job has the terminal, so that reading it would stop this process."""
        return _terminal.in_background(self.fd)

    def size(self) -> tuple[int, int]:
        """Columns and rows; zeros if it does not tell."""
        try:
            return os.get_terminal_size(self.fd)
        except OSError:
            return 0, 0

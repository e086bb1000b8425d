"""The host ends of a guest's consoles: serial port and virtio-console alike.

A :class:`Console` owns a :class:`Sink`, which a device writes to, and feeds a :class:`Port`, which a device
is. It lives longer than a VM: after a reboot the next device is connected to the same console.
"""

from pileus.console._sink import Sink
from pileus.console.console import Console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Console", "Sink", "open_console"]


def open_console(
    mode: str,
    path: str = "",
    *,
    name: str = "console",
    warn: "Callable[[str], None] | None" = None,
    quit: "Callable[[], None] | None" = None,
) -> Console:
    """The console of one ``mode``: null, tty, file, pty or socket; file and socket need a ``path``.

    ``warn`` gets a sentence when output starts to get lost; ``quit`` is called for Ctrl-A x on a tty.
    The caller starts and closes it. Raises HostError where the host refuses the file, pty or socket.
    """
    if mode == "null":
        return Console(name, warn)
    if mode == "tty":
        from pileus.console.tty import TtyConsole

        return TtyConsole(name, warn, quit)
    if mode == "file":
        from pileus.console.file import FileConsole

        return FileConsole(path, name, warn)
    if mode == "pty":
        from pileus.console.pty import PtyConsole

        return PtyConsole(name, warn)
    if mode == "socket":
        from pileus.console.unix_socket import SocketConsole

        return SocketConsole(path, name, warn)
    raise ValueError(f"{name}: no console mode {mode}")

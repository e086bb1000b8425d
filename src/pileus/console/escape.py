"""The escape key of a terminal console: Ctrl-A, then one more key, as in QEMU and kvmtool."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CTRL_A = 0x01


class Escape:
    """Takes the commands out of what is typed. ``commands`` maps the key after Ctrl-A to a call.

    Ctrl-A twice, or Ctrl-A a, sends one Ctrl-A. Before any other key Ctrl-A is sent too: nothing is lost.
    """

    def __init__(self, commands: "Mapping[int, Callable[[], None]]") -> None:
        self._commands = commands
        self._escaped = False

    def filter(self, data: bytes) -> bytes:
        """What of ``data`` is for the guest; the commands in it are called."""
        if not self._escaped and CTRL_A not in data:
            return data
        return b"".join(map(self._key, data))

    def _key(self, key: int) -> bytes:
        if not self._escaped:
            self._escaped = key == CTRL_A
            return b"" if self._escaped else bytes((key,))
        self._escaped = False
        if key in self._commands:
            self._commands[key]()
            return b""
        return b"\x01" if key in (CTRL_A, ord("a")) else bytes((CTRL_A, key))

"""The interrupts of a device, and the eventfds by which the client wants to hear of them."""

import _thread
import errno
import os

from pileus.vfio import abi
from pileus.vfio_user.dma import Refused

ONE = (abi.DATA_NONE, abi.DATA_BOOL, abi.DATA_EVENTFD)
DISABLE = abi.DATA_NONE | abi.ACTION_TRIGGER


class Interrupts:
    """``counts``: how many of each kind. Any thread may raise them; who serves the client sets them."""

    def __init__(self, counts: dict[int, int]) -> None:
        self.counts = counts
        self.line = False  # whether the pin, if there is one, is asserted
        self._masked = False
        self._fds: dict[tuple[int, int], int] = {}  # (kind, number)
        self._lock = _thread.allocate_lock()

    def flags(self, kind: int) -> int:
        return abi.EVENTFD | (abi.MASKABLE | abi.AUTOMASKED if kind == abi.INTX else 0)

    def set(self, kind: int, flags: int, start: int, count: int, data: bytes, fds: list[int]) -> None:
        """What DEVICE_SET_IRQS asks for; takes ``fds`` over where it succeeds. Raises Refused."""
        what, action = flags & abi.DATA, flags & abi.ACTION
        if kind not in self.counts or flags != what | action or what not in ONE:
            raise Refused(errno.EINVAL)
        if start + count > self.counts[kind]:
            raise Refused(errno.EINVAL)
        if len(data) != (count if what == abi.DATA_BOOL else 0) or (fds and what != abi.DATA_EVENTFD):
            raise Refused(errno.EINVAL)
        numbers = range(start, start + count)
        with self._lock:
            if flags == DISABLE and not count:
                self._forget(kind)
            elif what == abi.DATA_EVENTFD:
                self._assign(kind, action, numbers, fds)
            else:
                chosen = [at for at, each in enumerate(numbers) if what == abi.DATA_NONE or data[at]]
                self._act(kind, action, [numbers[at] for at in chosen])

    def signal(self, number: int) -> bool:
        """Raise MSI-X vector ``number``; False if the client does not listen for it."""
        with self._lock:
            return self._signal(abi.MSIX, number)

    def set_line(self, level: bool) -> None:
        """Assert or release the pin. The client hears of it once, and again if it still is when it looked."""
        with self._lock:
            self.line = level
            self._raise_line()

    @property
    def messages(self) -> bool:
        """Whether the client listens for any MSI-X vector."""
        return any(kind == abi.MSIX for kind, _ in list(self._fds))

    def clear(self) -> None:
        """The client has gone."""
        with self._lock:
            for kind in self.counts:
                self._forget(kind)

    def _forget(self, kind: int) -> None:
        for key in [key for key in self._fds if key[0] == kind]:
            os.close(self._fds.pop(key))
        if kind == abi.INTX:
            self._masked = False

    def _assign(self, kind: int, action: int, numbers: range, fds: list[int]) -> None:
        if action != abi.ACTION_TRIGGER or len(fds) not in (0, len(numbers)):
            raise Refused(errno.EINVAL)
        for number in numbers:
            if (old := self._fds.pop((kind, number), None)) is not None:
                os.close(old)
        for number in numbers if fds else ():
            self._fds[kind, number] = fds.pop(0)
        if kind == abi.INTX:
            self._masked = False
            self._raise_line()

    def _act(self, kind: int, action: int, numbers: list[int]) -> None:
        if action == abi.ACTION_TRIGGER:
            for number in numbers:
                self._signal(kind, number)
        elif kind != abi.INTX or action not in (abi.ACTION_MASK, abi.ACTION_UNMASK):
            raise Refused(errno.EINVAL)
        elif numbers:
            self._masked = action == abi.ACTION_MASK
            self._raise_line()

    def _raise_line(self) -> None:
        if self.line and not self._masked and self._signal(abi.INTX, 0):
            self._masked = True

    def _signal(self, kind: int, number: int) -> bool:
        fd = self._fds.get((kind, number))
        if fd is None:
            return False
        try:
            os.write(fd, (1).to_bytes(8, "little"))  # not eventfd_write: what it is, the client chose
        except OSError:
            return False
        return True

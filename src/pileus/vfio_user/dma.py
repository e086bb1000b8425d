"""The client's memory as a device sees it: by the addresses it gives, mapped here where it sent a file."""

import _thread
import errno
import mmap
import os

from pileus.errors import GuestError
from pileus.vfio import abi
from pileus.vfio_user.protocol import MAX_DMA_MAPS, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Messages(Protocol):
        """How memory is reached that came without a file."""

        def read_memory(self, iova: int, size: int) -> bytes: ...
        def write_memory(self, iova: int, data: bytes) -> None: ...


class DmaError(GuestError):
    """A device's address is no memory of the client, or not for this."""


class Refused(Exception):  # noqa: N818 - no error of ours: the answer to a request
    """A request fails with ``errno``."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class Window:
    """``size`` bytes from ``iova`` on; ``memory`` is them, None where they are reached by messages."""

    __slots__ = ("flags", "iova", "memory", "size")

    def __init__(self, iova: int, size: int, flags: int, memory: "mmap.mmap | None") -> None:
        self.iova = iova
        self.size = size
        self.flags = flags
        self.memory = memory


class DmaSpace:
    """What the client has mapped. Any thread may read and write; messages are for the one that serves.

    A client that takes bytes out of a file that it gave us ends this process, which serves nobody else.
    """

    def __init__(self) -> None:
        self.messages: Messages | None = None  # of the present client
        self._windows: dict[int, Window] = {}  # by iova
        self._lock = _thread.allocate_lock()

    @property
    def windows(self) -> list[tuple[int, int]]:
        """(iova, size) of each, ascending."""
        with self._lock:
            return sorted((each.iova, each.size) for each in self._windows.values())

    def map(self, iova: int, size: int, flags: int, fd: int | None, offset: int) -> None:
        """Let the device see ``size`` bytes at ``iova``; the caller keeps ``fd``. Raises Refused."""
        if not 0 < size <= (1 << 64) - iova or flags & ~(abi.DMA_READ | abi.DMA_WRITE):
            raise Refused(errno.EINVAL)
        with self._lock:
            if len(self._windows) >= MAX_DMA_MAPS:
                raise Refused(errno.ENOSPC)
            if any(
                iova < each.iova + each.size and each.iova < iova + size for each in self._windows.values()
            ):
                raise Refused(errno.EEXIST)
            memory = None if fd is None else _map(fd, size, flags, offset)
            self._windows[iova] = Window(iova, size, flags, memory)

    def unmap(self, iova: int, size: int) -> None:
        """Exactly what was mapped. Raises Refused."""
        with self._lock:
            window = self._windows.get(iova)
            if window is None or window.size != size:
                raise Refused(errno.ENOENT)
            del self._windows[iova]
            if window.memory is not None:
                window.memory.close()

    def clear(self) -> None:
        """The client has gone, and all its memory."""
        with self._lock:
            for window in self._windows.values():
                if window.memory is not None:
                    window.memory.close()
            self._windows.clear()

    def read(self, iova: int, size: int) -> bytes:
        """A copy of the client's memory. Raises DmaError where it gave none for that."""
        parts = []
        while size > 0:
            with self._lock:
                window, offset, length = self._find(iova, size, abi.DMA_READ)
                if window.memory is not None:
                    parts.append(window.memory[offset : offset + length])
            if window.memory is None:
                parts.append(self._reach().read_memory(iova, length))
            iova, size = iova + length, size - length
        return b"".join(parts)

    def write(self, iova: int, data: bytes) -> None:
        """Copy ``data`` to the client's memory. Raises DmaError as ``read`` does; a part may be written."""
        while data:
            with self._lock:
                window, offset, length = self._find(iova, len(data), abi.DMA_WRITE)
                if window.memory is not None:
                    window.memory[offset : offset + length] = data[:length]
            if window.memory is None:
                self._reach().write_memory(iova, data[:length])
            iova, data = iova + length, data[length:]

    def _find(self, iova: int, size: int, access: int) -> tuple[Window, int, int]:
        """The window that has ``iova``, the offset in it, and how much of ``size`` is there."""
        for window in self._windows.values():
            if window.iova <= iova < window.iova + window.size:
                if not window.flags & access:
                    break
                return window, iova - window.iova, min(size, window.iova + window.size - iova)
        raise DmaError(f"the client gave no memory at {iova:#x} for that")

    def _reach(self) -> "Messages":
        if self.messages is None:
            raise DmaError("the client has gone")
        return self.messages


def _map(fd: int, size: int, flags: int, offset: int) -> mmap.mmap:
    """A mapping of what is there of the file. Raises Refused."""
    if offset % PAGE_SIZE or offset >= 1 << 63 or size >= 1 << 63:
        raise Refused(errno.EINVAL)
    access = (mmap.PROT_READ if flags & abi.DMA_READ else 0) | (
        mmap.PROT_WRITE if flags & abi.DMA_WRITE else 0
    )
    try:
        if os.fstat(fd).st_size < offset + size:
            raise Refused(errno.EINVAL)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=access, offset=offset)
    except (OSError, ValueError, OverflowError) as error:
        raise Refused(getattr(error, "errno", None) or errno.EINVAL) from error

"""A file that goes into guest memory: a kernel or an initramfs, named by an option."""

import os
import stat

from pileus.arch.x86_64.layout import HIGH_RAM
from pileus.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    class GuestMemory(Protocol):
        """What loading needs of :class:`pileus.memory.GuestMemory`."""

        @property
        def size(self) -> int: ...
        @property
        def ranges(self) -> list[tuple[int, int]]: ...
        def write(self, gpa: int, data: bytes | memoryview) -> None: ...
        def load_file(self, gpa: int, fd: int, offset: int, length: int) -> None: ...


NOT_A_FILE = {
    stat.S_IFDIR: "is a directory, not a file",
    stat.S_IFIFO: "is a FIFO: a regular file is needed",
    stat.S_IFSOCK: "is a socket: a regular file is needed",
    stat.S_IFCHR: "is a device: a regular file is needed",
    stat.S_IFBLK: "is a device: a regular file is needed",
}


class Image:
    """The regular file at ``path``, open and not empty, with ``size`` bytes; ``with`` closes it.

    Only headers are ever read to Python: ``load`` goes from the file to guest memory.
    """

    __slots__ = ("fd", "option", "path", "size")

    def __init__(self, option: str, path: str) -> None:
        """Raises ConfigError, which names ``option``, for a path that is not such a file."""
        self.option = option
        self.path = path
        self.fd = self._open()
        try:
            self.size = self._checked_size()
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> "Image":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        os.close(self.fd)

    def refuse(self, why: str) -> ConfigError:
        """The error to raise when this file is not what its option allows."""
        return ConfigError(self.option, self.path, why)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes: for headers. Raises ConfigError if the file ends before."""
        self.check_holds(offset, length)
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            raise HostError("read", self.path, error) from error
        if len(data) != length:
            raise self.refuse("became shorter while it was read")
        return data

    def check_holds(self, offset: int, length: int) -> None:
        """Raise ConfigError unless the file has ``length`` bytes at ``offset``."""
        if offset + length > self.size:
            raise self.refuse(
                f"is truncated: it has {self.size} bytes, its header asks for {offset + length}"
            )

    def load(self, memory: "GuestMemory", gpa: int, offset: int, length: int) -> None:
        """Read that part of the file to RAM at ``gpa``, which the caller has checked."""
        try:
            memory.load_file(gpa, self.fd, offset, length)
        except EOFError as error:
            raise self.refuse("became shorter while it was loaded") from error
        except OSError as error:
            raise HostError("read", self.path, error) from error

    def _open(self) -> int:
        try:  # O_NONBLOCK: a FIFO without a writer must not hold us up
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            raise self.refuse(f"cannot be opened: {error.strerror}") from error
        except ValueError as error:  # a NUL, or a lone surrogate
            raise self.refuse("is not a possible path") from error

    def _checked_size(self) -> int:
        status = os.fstat(self.fd)
        if (wrong := NOT_A_FILE.get(stat.S_IFMT(status.st_mode))) is not None:
            raise self.refuse(wrong)
        if not status.st_size:
            raise self.refuse("is empty")
        return status.st_size


def in_ram(memory: "GuestMemory", gpa: int, size: int) -> bool:
    """Whether all of ``[gpa, gpa + size)`` is RAM of one region, at 1 MiB or above."""
    end = gpa + size
    return gpa >= HIGH_RAM and any(base <= gpa and end <= base + length for base, length in memory.ranges)


def mib(size: int) -> str:
    """``size`` bytes in words, for messages: rounded up to whole MiB."""
    return f"{-(-size >> 20)} MiB"

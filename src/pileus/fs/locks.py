"""Locks of the guest's processes, as the host's: between guests, and with programs of the host.

A POSIX lock belongs to a process there. Here it belongs to an open file description, one for each of the
driver's owners and inodes, so that the owners of one guest exclude each other too.

Source: fcntl(2), Open file description locks; flock(2)
"""

import errno
import fcntl
import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.fs.inodes import Inode

F_OFD_GETLK, F_OFD_SETLK = 36, 37
FLOCK = struct.Struct("<hh4xqqi4x")  # type, whence, start, length (0: to the end), process
KINDS = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
END = (1 << 63) - 1  # of a lock that has none
WHOLE = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}


class BlockedError(Exception):
    """Somebody has the lock, and the driver wants to wait: the same request is to be tried again."""


class Locks:
    """Of all inodes. Raises OSError where the host refuses."""

    def take(self, inode: "Inode", owner: int, start: int, end: int, kind: int, *, wait: bool) -> None:
        """Lock or unlock the bytes from ``start`` to ``end``. Raises BlockedError with ``wait``."""
        request = _request(start, end, kind)
        fd = inode.owners.get(owner)
        if fd is None:
            if kind == fcntl.F_UNLCK:
                return
            fd = _description(inode)
        try:
            fcntl.fcntl(fd, F_OFD_SETLK, request)
        except OSError as error:
            if owner not in inode.owners:
                os.close(fd)
            raise _blocked(error, wait) from None
        inode.owners[owner] = fd

    def conflict(
        self, inode: "Inode", owner: int, start: int, end: int, kind: int
    ) -> tuple[int, int, int, int]:
        """First and last byte, kind and process of a lock that is in the way; F_UNLCK where none is."""
        fd = inode.owners.get(owner)
        own = fd if fd is not None else _description(inode)
        try:
            found = fcntl.fcntl(own, F_OFD_GETLK, _request(start, end, kind))
        finally:
            if fd is None:
                os.close(own)
        kind, _, start, length, _ = FLOCK.unpack(found)
        return start, start + length - 1 if length else END, kind, 0

    def take_whole(self, fd: int, kind: int, *, wait: bool) -> None:
        """Lock or unlock an open file as a whole, as flock does."""
        if kind not in WHOLE:
            raise OSError(errno.EINVAL, "not a lock")
        try:
            fcntl.flock(fd, WHOLE[kind] | fcntl.LOCK_NB)
        except OSError as error:
            raise _blocked(error, wait) from None

    def drop(self, inode: "Inode", owner: int) -> None:
        """The owner has closed the file: all its locks there end."""
        fd = inode.owners.pop(owner, None)
        if fd is not None:
            os.close(fd)


def _blocked(error: OSError, wait: bool) -> Exception:
    return BlockedError() if wait and error.errno in (errno.EAGAIN, errno.EACCES) else error


def _description(inode: "Inode") -> int:
    """An open file description of its own."""
    if inode.kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, "no file to lock")
    for flags in (os.O_RDWR, os.O_RDONLY):
        try:
            return os.open(inode.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            refused = error
    raise refused


def _request(start: int, end: int, kind: int) -> bytes:
    if kind not in KINDS or not 0 <= start <= end <= END:
        raise OSError(errno.EINVAL, "not a lock")
    return FLOCK.pack(kind, os.SEEK_SET, start, 0 if end == END else end - start + 1, 0)

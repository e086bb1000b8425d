"""Locks of image files between processes: one writer, or any number of readers.

They are the very bytes that QEMU locks, so that ``qemu-img`` and other VMMs see them, and we see theirs. No
lock ever makes another wait: each holder puts shared locks on one byte for every thing it does (at 100) and
on one for every thing that it cannot bear others to do (at 200), then looks whether somebody holds the
counterpart. They go when the descriptor is closed, however its process ends.

Source: QEMU, block/file-posix.c (what is locked), include/block/block-common.h (numbers of the permissions);
fcntl(2), "Open file description locks".
"""

import fcntl
import os
import struct
import time
from errno import EINVAL, ENOLCK, EOPNOTSUPP

from pileus import log
from pileus.errors import HostError

DOES, FORBIDS = 100, 200  # offsets of the first byte of each kind
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3  # what can be done or forbidden: more to add to these
FLOCK = struct.Struct("@hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid
PATIENCE = (
    1.0  # seconds: the kernel closes the io_uring of a process that was killed, and its files, a bit later
)
UNSUPPORTED = (EINVAL, ENOLCK, EOPNOTSUPP)  # some network file systems


def lock(fd: int, path: str, *, readonly: bool) -> None:
    """Lock the file of ``fd`` for as long as it is open. Raises HostError where another is at odds."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not _lock(fd, readonly):
            if time.monotonic() > deadline:
                use = "it is in use by another process"
                raise HostError("open", path, use if not readonly else f"{use}, which writes to it")
            time.sleep(0.01 + os.getpid() % 8 / 1000)  # two that start together are not to meet for ever
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise HostError("lock", path, error) from error
        log.warning(f"{path}: its file system has no locks; nothing keeps another process from writing to it")


def _lock(fd: int, readonly: bool) -> bool:
    """Whether that could be; otherwise nothing is locked. Raises OSError."""
    does = (CONSISTENT_READ,) if readonly else (CONSISTENT_READ, WRITE, RESIZE)
    forbids = (WRITE, RESIZE)  # a reader that does not see changes needs this as well
    for byte in [*(DOES + each for each in does), *(FORBIDS + each for each in forbids)]:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    if any(_held(fd, FORBIDS + each) for each in does) or any(_held(fd, DOES + each) for each in forbids):
        unlock(fd)
        return False
    return True


def unlock(fd: int) -> None:
    """Give all locks back before ``fd`` is closed."""
    _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, DOES, 2 * (FORBIDS - DOES))


def _held(fd: int, byte: int) -> bool:
    """Whether somebody else has a lock on ``byte``."""
    return _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK


def _fcntl(fd: int, command: int, kind: int, start: int, length: int = 1) -> int:
    answer = fcntl.fcntl(fd, command, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    return int(FLOCK.unpack(answer)[0])

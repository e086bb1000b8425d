"""Our own descriptions of what we inherited as stdin and stdout.

O_NONBLOCK belongs to a description, which we share with the shell and with other processes: setting it
there would surprise them. Opening /proc/self/fd/N again gives a description of our own.
"""

import os
import stat

from pileus.console._sink import ONE_BYTE, SEND, WRITE


def own_output(fd: int) -> tuple[int, int]:
    """A descriptor for writing what ``fd`` writes to, and the Sink mode that never blocks on it.

    The caller closes it. Both share their offset where it matters: a regular file is not opened again,
    since that would start at offset 0 and overwrite what is there.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISSOCK(kind):
        return os.dup(fd), SEND
    if stat.S_ISREG(kind):
        return os.dup(fd), WRITE  # never asks to wait
    try:
        return _reopen(fd, os.O_WRONLY), WRITE
    except OSError:  # another user's terminal, a pipe without a reader, no /proc
        return os.dup(fd), ONE_BYTE


def own_input(fd: int) -> int:
    """A descriptor for reading what ``fd`` reads, without blocking where that is possible."""
    try:
        return _reopen(fd, os.O_RDONLY)
    except OSError:
        return os.dup(fd)


def _reopen(fd: int, access: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)

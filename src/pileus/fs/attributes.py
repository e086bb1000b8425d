"""Attributes of files: as the driver sees them, and whose a new one is."""

import os
import stat
import time

from pileus.fs import abi
from pileus.fs.identity import Ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.fs.inodes import Inode

    Owner = tuple[int, int]  # user and group of the host; -1 for the one that it has anyway

SECOND = 1_000_000_000
KEPT = -1
SET_ID = stat.S_ISUID | stat.S_ISGID


class Attributes:
    """``validity`` is for how many seconds the driver may believe them."""

    def __init__(self, uids: Ids, gids: Ids, validity: int) -> None:
        self._uids = uids
        self._gids = gids
        self._validity = validity

    def pack(self, about: os.stat_result) -> bytes:
        atime, mtime, ctime = (
            divmod(each, SECOND) for each in (about.st_atime_ns, about.st_mtime_ns, about.st_ctime_ns)
        )
        return abi.ATTRIBUTES.pack(
            about.st_ino,
            about.st_size,
            about.st_blocks,
            *(each[0] & (1 << 64) - 1 for each in (atime, mtime, ctime)),
            *(each[1] for each in (atime, mtime, ctime)),
            about.st_mode,
            about.st_nlink & 0xFFFFFFFF,
            self._uids.to_guest(about.st_uid),
            self._gids.to_guest(about.st_gid),
            _device(about.st_rdev),
            about.st_blksize & 0xFFFFFFFF,
            0,
        )

    def reply(self, about: os.stat_result) -> bytes:
        return abi.ATTR_OUT.pack(self._validity, 0) + self.pack(about)

    def entry(self, inode: "Inode", about: os.stat_result) -> bytes:
        """A name's, with what the driver calls the inode."""
        return abi.ENTRY_OUT.pack(inode.id, 0, self._validity, self._validity, 0, 0) + self.pack(about)

    def owner(self, parent: "Inode", uid: int, gid: int) -> "Owner":
        """Whose a new file in ``parent`` is, made by the driver's ``uid`` and ``gid``. Raises OSError."""
        owner = self._uids.to_host(uid), self._gids.to_host(gid)
        about = os.fstat(parent.fd)
        return (owner[0], KEPT) if about.st_mode & stat.S_ISGID else owner

    def give(self, path: str, owner: "Owner", mode: int) -> None:
        """Make what was just made with ``mode`` at ``path`` be ``owner``'s.

        Without root's rights all files are ours, as for any file server that has none.
        """
        if os.geteuid():
            return
        if owner != (0, 0):
            os.chown(path, *owner)
        if mode & SET_ID and not stat.S_ISLNK(mode):  # which that took away, or the making
            os.chmod(path, mode & 0o7777)

    def change_owner(self, path: str, uid: "int | None", gid: "int | None") -> None:
        """None leaves one as it is. Raises OSError."""
        os.chown(
            path,
            KEPT if uid is None else self._uids.to_host(uid),
            KEPT if gid is None else self._gids.to_host(gid),
        )


def times(
    about: os.stat_result, valid: int, atime: "tuple[int, int]", mtime: "tuple[int, int]"
) -> "tuple[int, int]":
    """Access and modification time in nanoseconds that SETATTR asks for, of seconds and the rest."""
    return (
        _time(valid & abi.SET_ATIME, valid & abi.SET_ATIME_NOW, atime, about.st_atime_ns),
        _time(valid & abi.SET_MTIME, valid & abi.SET_MTIME_NOW, mtime, about.st_mtime_ns),
    )


def _time(wanted: int, now: int, value: "tuple[int, int]", old: int) -> int:
    if not wanted:
        return old
    if now:
        return time.time_ns()
    seconds = value[0] - (1 << 64) if value[0] >> 63 else value[0]
    return seconds * SECOND + value[1]


def _device(number: int) -> int:
    """A device's number as the kernel takes it: 32 bits (new_encode_dev)."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12) & 0xFFFFFFFF

"""The inodes that the driver knows, each by an O_PATH descriptor of ours.

What is held so stays what it is, whatever happens to its names: no path is ever walked again, and a number
that the driver sends is an index, which names nothing but what it was told of.

Source: open(2), O_PATH; Linux, include/uapi/linux/fuse.h: nlookup, FORGET
"""

import errno
import os
import stat

from pileus.fs import abi

INODE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Inode:
    """A file, directory, link or special file. ``fd`` is an O_PATH descriptor, which this owns."""

    __slots__ = ("fd", "id", "key", "kind", "lookups", "owners")

    def __init__(self, id: int, fd: int, key: tuple[int, int], kind: int) -> None:
        self.id = id
        self.fd = fd
        self.key = key  # what it is on the host
        self.kind = kind  # S_IFMT of its mode, which never changes
        self.lookups = 0  # that the driver was told of, and has not forgotten
        self.owners: dict[int, int] = {}  # of locks: an open file description for each of the driver's

    @property
    def path(self) -> str:
        """For system calls that take paths; it leads to the inode itself, also to a link."""
        return f"/proc/self/fd/{self.fd}"

    def close(self) -> None:
        os.close(self.fd)
        for fd in self.owners.values():
            os.close(fd)
        self.owners.clear()


class Inodes:
    """Those below the directory ``root``, a descriptor that this takes over, and the root itself."""

    def __init__(self, root: int) -> None:
        about = os.fstat(root)
        self._root = Inode(abi.ROOT_ID, root, _key(about), stat.S_IFMT(about.st_mode))
        self._by_id = {abi.ROOT_ID: self._root}
        self._by_key = {self._root.key: self._root}
        self._next = abi.ROOT_ID + 1  # ids are used once

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, id: int) -> Inode:
        """Raises OSError for a number that stands for nothing."""
        try:
            return self._by_id[id]
        except KeyError:
            raise OSError(errno.ENOENT, "no such inode") from None

    def directory(self, id: int) -> Inode:
        inode = self[id]
        if inode.kind != stat.S_IFDIR:
            raise OSError(errno.ENOTDIR, "not a directory")
        return inode

    def look_up(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """What ``name``, one component, is in ``parent``, told to the driver once more."""
        return self.found(os.open(name, INODE_FLAGS, dir_fd=parent.fd))

    def found(self, fd: int) -> tuple[Inode, os.stat_result]:
        """Likewise for the inode of the O_PATH descriptor ``fd``, which this takes over."""
        try:
            about = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        inode = self._by_key.get(_key(about))
        if inode is None:
            inode = Inode(self._next, fd, _key(about), stat.S_IFMT(about.st_mode))
            self._next += 1
            self._by_id[inode.id] = self._by_key[inode.key] = inode
        else:
            os.close(fd)
        inode.lookups += 1
        return inode, about

    def forget(self, id: int, lookups: int) -> None:
        """The driver has forgotten so many of them; a number that stands for nothing is ignored."""
        inode = self._by_id.get(id)
        if inode is None or inode is self._root:
            return
        inode.lookups -= min(lookups, inode.lookups)
        if not inode.lookups:
            self._drop(inode)

    def clear(self) -> None:
        """Forget all but the root."""
        for inode in list(self._by_id.values()):
            if inode is not self._root:
                self._drop(inode)

    def close(self) -> None:
        self.clear()
        self._root.close()

    def _drop(self, inode: Inode) -> None:
        del self._by_id[inode.id], self._by_key[inode.key]
        inode.close()


def _key(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino

"""Files and directories that the driver has open, by numbers that are used once."""

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.fs.inodes import Inode


class File:
    """``fd`` is open for reading or writing, and this owns it."""

    __slots__ = ("fd", "inode")

    def __init__(self, inode: "Inode", fd: int) -> None:
        self.inode = inode
        self.fd = fd


class Files:
    """The table. A file that is released is closed; so are all that are left in the end."""

    def __init__(self) -> None:
        self._files: dict[int, File] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._files)

    def open(self, inode: "Inode", flags: int) -> int:
        """A handle for ``inode``, which must be a regular file: opening others can wait, or do something."""
        return self.add(inode, self.descriptor(inode, flags))

    def descriptor(self, inode: "Inode", flags: int) -> int:
        """A new descriptor of the regular file ``inode``, the caller's to close."""
        if inode.kind != stat.S_IFREG:
            raise OSError(errno.EISDIR if inode.kind == stat.S_IFDIR else errno.ENXIO, "not a file")
        return os.open(inode.path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)

    def open_directory(self, inode: "Inode") -> int:
        return self.add(inode, os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=inode.fd))

    def add(self, inode: "Inode", fd: int) -> int:
        """A handle for ``fd``, which this takes over."""
        handle = self._next
        self._next += 1
        self._files[handle] = File(inode, fd)
        return handle

    def file(self, handle: int) -> File:
        """Raises OSError for a number that stands for none."""
        file = self._files.get(handle)
        if file is None or file.inode.kind == stat.S_IFDIR:
            raise OSError(errno.EBADF, "no such open file")
        return file

    def directory(self, handle: int) -> File:
        file = self._files.get(handle)
        if file is None or file.inode.kind != stat.S_IFDIR:
            raise OSError(errno.EBADF, "no such open directory")
        return file

    def release(self, handle: int) -> None:
        file = self._files.pop(handle, None)
        if file is None:
            raise OSError(errno.EBADF, "no such open file")
        os.close(file.fd)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1].fd)

"""One driver's session with a shared directory: requests in, replies out.

Every number of a request was checked when it comes to be used: inodes and open files are looked up in tables,
names are single components. What the host refuses is the reply, as -errno. Names are opened with O_NOFOLLOW
in an open directory, so that neither ``..`` nor a link, nor one that is put there meanwhile, leads out.

Source: Linux, Documentation/filesystems/fuse.rst, include/uapi/linux/fuse.h; virtio 1.2, 5.11.6
"""

import errno
import os
import stat
import struct

from pileus import log
from pileus.fs import _calls, abi, extended
from pileus.fs.attributes import Attributes, times
from pileus.fs.files import Files
from pileus.fs.inodes import INODE_FLAGS, Inodes
from pileus.fs.locks import Locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pileus.fs.identity import Ids
    from pileus.fs.inodes import Inode

    class Vessel(Protocol):
        """A request's bytes, and room for its reply's: a Chain of virtio."""

        @property
        def readable_len(self) -> int: ...
        @property
        def writable_len(self) -> int: ...
        def read(self, length: int = ..., offset: int = 0) -> bytes: ...
        def write(self, data: bytes, offset: int = 0) -> int: ...
        def read_to(self, fd: int, at: int, length: int, offset: int = 0) -> int: ...
        def write_from(self, fd: int, at: int, length: int, offset: int = 0) -> int: ...

    class Window(Protocol):
        """Memory of the guest in which parts of files appear. Raises OSError."""

        def map(self, fd: int, at: int, offset: int, length: int, writable: bool) -> None: ...
        def unmap(self, offset: int, length: int) -> None: ...

    # The reply's body, or how much of it is in place already; None for none.
    Reply = bytes | int | None
    Handler = Callable[["Session", "Header", bytes, Vessel], Reply]
    Header = tuple[int, int, int]  # node, user, group

MAX_REQUEST = 1 << 17  # bytes, without the data of WRITE: an extended attribute has 64 KiB
MAX_WRITE = 1 << 20
PAGE = 4096
NAME_MAX = 255
CREATION = (
    os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
)  # flags of open(2) that are the driver's
SEEK = (os.SEEK_DATA, os.SEEK_HOLE)
RENAME_FLAGS = 1 | 2  # NOREPLACE, EXCHANGE: a whiteout is a device, which its owner makes by itself
SPECIAL = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)  # what MKNOD makes
FALLOCATE_MODES = 0x01 | 0x02 | 0x10 | 0x40  # KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, UNSHARE_RANGE
AUTO, ALWAYS, NEVER = "auto", "always", "never"
VALIDITY = {AUTO: 1, ALWAYS: 86400, NEVER: 0}  # seconds for which the driver may believe what it was told
WANTED = (
    abi.ASYNC_READ
    | abi.ATOMIC_O_TRUNC
    | abi.BIG_WRITES
    | abi.AUTO_INVAL_DATA
    | abi.DO_READDIRPLUS
    | abi.READDIRPLUS_AUTO
    | abi.ASYNC_DIO
    | abi.PARALLEL_DIROPS
    | abi.MAX_PAGES
    | abi.INIT_EXT
)


class Session:
    """Serves the directory ``root``, a descriptor that this takes over. One request at a time."""

    def __init__(
        self,
        root: int,
        uids: "Ids",
        gids: "Ids",
        *,
        readonly: bool = False,
        cache: str = AUTO,
        xattr: bool = True,
        locks: bool = False,
        window: "Window | None" = None,
    ) -> None:
        self.window = window
        self._inodes = Inodes(root)
        self._files = Files()
        self._attributes = Attributes(uids, gids, VALIDITY[cache])
        self._locks = Locks()
        self._readonly = readonly
        self._cache = cache
        self._xattr = xattr
        self._remote_locks = locks

    def close(self) -> None:
        self._files.close()
        self._inodes.close()

    def clear(self) -> None:
        """The driver is gone, or begins anew: it has nothing open, and knows the root only."""
        self._files.close()
        self._inodes.clear()

    def serve(self, vessel: "Vessel") -> int:
        """Do what a request asks for; return the bytes of the reply, which is in place.

        Raises BlockedError, from before anything was done, where a lock has to be waited for.
        """
        readable = vessel.readable_len
        head = vessel.read(abi.IN_HEADER.size)
        if len(head) < abi.IN_HEADER.size:
            return 0
        length, opcode, unique, node, uid, gid, _, extensions = abi.IN_HEADER.unpack(head)
        if opcode not in SILENT and vessel.writable_len < abi.OUT_HEADER.size:
            return 0  # nobody could be told
        error = 0
        reply: Reply = b""
        try:
            if not abi.IN_HEADER.size <= length <= readable or extensions:
                raise OSError(errno.EINVAL, "a length that is none")
            handler = HANDLERS.get(opcode)
            if handler is None:
                raise OSError(errno.ENOSYS, "no such request")
            if opcode in CHANGES and self._readonly:
                raise OSError(errno.EROFS, "read-only")
            length = (
                abi.IN_HEADER.size + abi.WRITE_IN.size if opcode == abi.WRITE else min(length, MAX_REQUEST)
            )
            body = vessel.read(length - abi.IN_HEADER.size, abi.IN_HEADER.size)
            reply = handler(self, (node, uid, gid), body, vessel)
        except OSError as refused:
            error = refused.errno or errno.EIO
        except (struct.error, ValueError, OverflowError):
            error = errno.EINVAL
        if reply is None or opcode in SILENT:
            return 0
        return _answer(vessel, unique, error, b"" if error else reply)

    # -- the session ------------------------------------------------------------------------------

    def _init(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        version, minor, read_ahead, flags = abi.INIT_IN.unpack_from(body)
        if version != abi.VERSION:
            # A younger one asks again with ours; an older one is from before virtio.
            return abi.INIT_OUT.pack(abi.VERSION, abi.MINOR_VERSION, *(0,) * 9)
        self.clear()
        wanted = WANTED | (abi.CACHE_SYMLINKS if self._cache == ALWAYS else 0)
        wanted |= abi.POSIX_LOCKS | abi.FLOCK_LOCKS if self._remote_locks else 0
        wanted |= abi.MAP_ALIGNMENT if self.window is not None else 0
        return abi.INIT_OUT.pack(
            abi.VERSION,
            min(minor, abi.MINOR_VERSION),
            read_ahead,
            flags & wanted,
            64,  # requests in the background, and how many of them are a jam
            48,
            MAX_WRITE,
            1,  # nanosecond: what times are exact to
            MAX_WRITE // PAGE,
            PAGE.bit_length() - 1,
            0,
        )

    def _destroy(self, _header: "Header", _body: bytes, _vessel: "Vessel") -> bytes:
        self.clear()
        return b""

    def _forget(self, header: "Header", body: bytes, _vessel: "Vessel") -> None:
        self._inodes.forget(header[0], *abi.FORGET_IN.unpack_from(body))

    def _batch_forget(self, _header: "Header", body: bytes, _vessel: "Vessel") -> None:
        (count,) = abi.BATCH_FORGET_IN.unpack_from(body)
        entries = body[abi.BATCH_FORGET_IN.size :][: count * abi.FORGET_ONE.size]
        for node, lookups in abi.FORGET_ONE.iter_unpack(entries):
            self._inodes.forget(node, lookups)

    # -- names ------------------------------------------------------------------------------------

    def _look_up(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        parent = self._inodes.directory(header[0])
        return self._entry(parent, _name(body))

    def _entry(self, parent: "Inode", name: bytes) -> bytes:
        inode, about = self._inodes.look_up(parent, name)
        return self._attributes.entry(inode, about)

    def _make_node(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        mode, device, _ = abi.MKNOD_IN.unpack_from(body)
        name = _name(body[abi.MKNOD_IN.size :])
        if stat.S_IFMT(mode) not in SPECIAL:
            raise OSError(errno.EINVAL, "nothing to make by this")
        return self._made(
            header, name, mode, lambda parent: os.mknod(name, mode, _device(device), dir_fd=parent)
        )

    def _make_directory(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        mode, _ = abi.MKDIR_IN.unpack_from(body)
        name = _name(body[abi.MKDIR_IN.size :])
        return self._made(
            header, name, mode | stat.S_IFDIR, lambda parent: os.mkdir(name, mode & 0o7777, dir_fd=parent)
        )

    def _symbolic_link(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        name, target = _names(body)
        return self._made(header, name, stat.S_IFLNK, lambda parent: os.symlink(target, name, dir_fd=parent))

    def _made(self, header: "Header", name: bytes, mode: int, make: "Callable[[int], None]") -> bytes:
        """Make it in the header's node and for its user; an entry."""
        parent = self._inodes.directory(header[0])
        owner = self._attributes.owner(parent, header[1], header[2])
        make(parent.fd)
        inode, _ = self._inodes.look_up(parent, name)
        self._attributes.give(inode.path, owner, mode)
        return self._attributes.entry(inode, os.fstat(inode.fd))

    def _link(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        inode = self._inodes[abi.LINK_IN.unpack_from(body)[0]]
        parent, name = self._inodes.directory(header[0]), _name(body[abi.LINK_IN.size :])
        os.link(inode.path, name, dst_dir_fd=parent.fd, follow_symlinks=True)  # of /proc, to the inode itself
        return self._entry(parent, name)

    def _read_link(self, header: "Header", _body: bytes, _vessel: "Vessel") -> bytes:
        return os.readlink(b"", dir_fd=self._inodes[header[0]].fd)

    def _unlink(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        os.unlink(_name(body), dir_fd=self._inodes.directory(header[0]).fd)
        return b""

    def _remove_directory(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        os.rmdir(_name(body), dir_fd=self._inodes.directory(header[0]).fd)
        return b""

    def _rename(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        (target,) = abi.RENAME_IN.unpack_from(body)
        return self._moved(header[0], target, 0, body[abi.RENAME_IN.size :])

    def _rename2(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        target, flags = abi.RENAME2_IN.unpack_from(body)
        return self._moved(header[0], target, flags, body[abi.RENAME2_IN.size :])

    def _moved(self, source: int, target: int, flags: int, names: bytes) -> bytes:
        if flags & ~RENAME_FLAGS:
            raise OSError(errno.EINVAL, "flags that are none of ours")
        old, new = _names(names)
        _calls.rename(
            self._inodes.directory(source).fd, old, self._inodes.directory(target).fd, _name(new), flags
        )
        return b""

    # -- attributes -------------------------------------------------------------------------------

    def _get_attributes(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        flags, handle = abi.GETATTR_IN.unpack_from(body)
        fd = self._files.file(handle).fd if flags & abi.GETATTR_FH else self._inodes[header[0]].fd
        return self._attributes.reply(os.fstat(fd))

    def _set_attributes(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        fields = abi.SETATTR_IN.unpack_from(body)
        valid, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = fields
        inode = self._inodes[header[0]]
        if valid & abi.SET_MODE:
            os.chmod(inode.path, mode & 0o7777)
        if valid & (abi.SET_UID | abi.SET_GID):
            self._attributes.change_owner(
                inode.path, uid if valid & abi.SET_UID else None, gid if valid & abi.SET_GID else None
            )
        if valid & abi.SET_SIZE:
            if inode.kind != stat.S_IFREG:
                raise OSError(errno.EINVAL, "no size to set")
            if valid & abi.SET_HANDLE:
                os.ftruncate(self._files.file(handle).fd, size)
            else:
                os.truncate(inode.path, size)
        if valid & (abi.SET_ATIME | abi.SET_MTIME):
            os.utime(inode.path, ns=times(os.fstat(inode.fd), valid, (atime, atime_ns), (mtime, mtime_ns)))
        return self._attributes.reply(os.fstat(inode.fd))

    def _statistics(self, header: "Header", _body: bytes, _vessel: "Vessel") -> bytes:
        about = os.fstatvfs(self._inodes[header[0]].fd)
        return abi.STATFS_OUT.pack(
            about.f_blocks,
            about.f_bfree,
            about.f_bavail,
            about.f_files,
            about.f_ffree,
            about.f_bsize & 0xFFFFFFFF,
            about.f_namemax,
            about.f_frsize & 0xFFFFFFFF,
        )

    def _set_xattr(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        size, flags = abi.SETXATTR_IN.unpack_from(body)
        name, _, value = body[abi.SETXATTR_IN.size :].partition(b"\0")
        if size > len(value):
            raise OSError(errno.EINVAL, "a value that is not there")
        extended.put(self._with_xattr(header[0]).path, name, value[:size], flags)
        return b""

    def _get_xattr(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        (size,) = abi.GETXATTR_IN.unpack_from(body)
        name, _, _ = body[abi.GETXATTR_IN.size :].partition(b"\0")
        return _sized(extended.get(self._with_xattr(header[0]).path, name), size)

    def _list_xattr(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        (size,) = abi.GETXATTR_IN.unpack_from(body)
        return _sized(extended.names(self._with_xattr(header[0]).path), size)

    def _remove_xattr(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        extended.remove(self._with_xattr(header[0]).path, body.partition(b"\0")[0])
        return b""

    def _with_xattr(self, node: int) -> "Inode":
        if not self._xattr:
            raise OSError(errno.ENOSYS, "off")  # the driver does not ask again
        return self._inodes[node]

    # -- open files -------------------------------------------------------------------------------

    def _open(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        flags, _ = abi.OPEN_IN.unpack_from(body)
        return self._opened(self._inodes[header[0]], flags)

    def _opened(self, inode: "Inode", flags: int) -> bytes:
        if self._readonly and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            raise OSError(errno.EROFS, "read-only")
        return self._open_out(self._files.open(inode, flags & CREATION))

    def _open_out(self, handle: int, *, directory: bool = False) -> bytes:
        flags = 0
        if self._cache == ALWAYS:
            flags = abi.KEEP_CACHE | (abi.CACHE_DIRECTORY if directory else 0)
        elif self._cache == NEVER and not directory:
            flags = abi.DIRECT_IO
        return abi.OPEN_OUT.pack(handle, flags)

    def _create(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        flags, mode, _, _ = abi.CREATE_IN.unpack_from(body)
        name = _name(body[abi.CREATE_IN.size :])
        parent = self._inodes.directory(header[0])
        owner = self._attributes.owner(parent, header[1], header[2])
        new = flags & CREATION | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, new, mode & 0o7777, dir_fd=parent.fd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            # Whatever it is, it is not opened by its name, but as the regular file that it proves to be.
            inode, about = self._inodes.look_up(parent, name)
            try:
                return self._attributes.entry(inode, about) + self._opened(inode, flags)
            except BaseException:
                self._inodes.forget(inode.id, 1)
                raise
        try:
            self._attributes.give(f"/proc/self/fd/{fd}", owner, mode | stat.S_IFREG)
            inode, about = self._inodes.found(os.open(f"/proc/self/fd/{fd}", INODE_FLAGS & ~os.O_NOFOLLOW))
        except BaseException:
            os.close(fd)
            raise
        return self._attributes.entry(inode, about) + self._open_out(self._files.add(inode, fd))

    def _open_directory(self, header: "Header", _body: bytes, _vessel: "Vessel") -> bytes:
        return self._open_out(self._files.open_directory(self._inodes.directory(header[0])), directory=True)

    def _release(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        self._files.release(abi.RELEASE_IN.unpack_from(body)[0])
        return b""

    def _flush(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        """One of the driver's descriptors is closed: errors of writes are told then, and POSIX locks end."""
        handle, owner = abi.FLUSH_IN.unpack_from(body)
        fd = self._files.file(handle).fd
        self._locks.drop(self._inodes[header[0]], owner)
        os.close(os.dup(fd))
        return b""

    def _read(self, _header: "Header", body: bytes, vessel: "Vessel") -> int:
        handle, offset, size, *_ = abi.READ_IN.unpack_from(body)
        size = min(size, vessel.writable_len - abi.OUT_HEADER.size)
        return vessel.write_from(self._files.file(handle).fd, offset, size, abi.OUT_HEADER.size)

    def _write(self, _header: "Header", body: bytes, vessel: "Vessel") -> bytes:
        handle, offset, size, *_ = abi.WRITE_IN.unpack_from(body)
        start = abi.IN_HEADER.size + abi.WRITE_IN.size
        if size > vessel.readable_len - start:
            raise OSError(errno.EINVAL, "data that is not there")
        return abi.WRITE_OUT.pack(vessel.read_to(self._files.file(handle).fd, offset, size, start))

    def _sync(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        handle, flags = abi.FSYNC_IN.unpack_from(body)
        fd = self._files.file(handle).fd
        if flags & abi.FSYNC_DATA:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return b""

    def _sync_directory(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        os.fsync(self._files.directory(abi.FSYNC_IN.unpack_from(body)[0]).fd)
        return b""

    def _sync_all(self, _header: "Header", _body: bytes, _vessel: "Vessel") -> bytes:
        fd = os.open(self._inodes[abi.ROOT_ID].path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _calls.syncfs(fd)
        finally:
            os.close(fd)
        return b""

    def _allocate(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        handle, offset, length, mode = abi.FALLOCATE_IN.unpack_from(body)
        if mode & ~FALLOCATE_MODES:
            raise OSError(errno.EOPNOTSUPP, "a mode that is none of ours")
        _calls.fallocate(self._files.file(handle).fd, mode, offset, length)
        return b""

    def _seek(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        handle, offset, whence = abi.LSEEK_IN.unpack_from(body)
        if whence not in SEEK:
            raise OSError(errno.EINVAL, "the driver knows by itself")
        return abi.LSEEK_OUT.pack(os.lseek(self._files.file(handle).fd, offset, whence))

    def _copy(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        source, at, _, target, to, length, flags = abi.COPY_FILE_RANGE_IN.unpack_from(body)
        if flags:
            raise OSError(errno.EINVAL, "flags that are none of ours")
        fds = self._files.file(source).fd, self._files.file(target).fd
        length = min(length, 1 << 30)  # others wait
        return abi.WRITE_OUT.pack(os.copy_file_range(*fds, length, at, to))

    def _lock(self, header: "Header", body: bytes, *, wait: bool) -> bytes:
        handle, owner, start, end, kind, _, flags = abi.LOCK_IN.unpack_from(body)
        file = self._files.file(handle)
        if flags & abi.LOCK_FLOCK:
            self._locks.take_whole(file.fd, kind, wait=wait)
        else:
            inode = self._inodes[header[0]]
            self._locks.take(inode, owner, start, end, kind, wait=wait)
        return b""

    def _set_lock(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        return self._lock(header, body, wait=False)

    def _await_lock(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        return self._lock(header, body, wait=True)

    def _get_lock(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        _, owner, start, end, kind, _, _ = abi.LOCK_IN.unpack_from(body)
        return abi.LOCK_OUT.pack(*self._locks.conflict(self._inodes[header[0]], owner, start, end, kind))

    # -- directories ------------------------------------------------------------------------------

    def _read_directory(self, _header: "Header", body: bytes, vessel: "Vessel") -> bytes:
        return self._entries(body, vessel, plus=False)

    def _read_directory_plus(self, _header: "Header", body: bytes, vessel: "Vessel") -> bytes:
        return self._entries(body, vessel, plus=True)

    def _entries(self, body: bytes, vessel: "Vessel", *, plus: bool) -> bytes:
        handle, offset, size, *_ = abi.READ_IN.unpack_from(body)
        directory = self._files.directory(handle)
        left = min(size, MAX_WRITE, vessel.writable_len - abi.OUT_HEADER.size)
        parts: list[bytes] = []
        for name, number, after, kind in _calls.read_entries(directory.fd, offset):
            entry = abi.DIRENT.pack(number, after, len(name), kind) + name
            entry += bytes(-len(entry) % abi.ALIGN)
            if (len(entry) + (ENTRY_SIZE if plus else 0)) > left:
                if not parts:
                    raise OSError(errno.EINVAL, "no room for one entry")
                break
            if plus:
                entry = self._known(directory.inode, name) + entry
            parts.append(entry)
            left -= len(entry)
        return b"".join(parts)

    def _known(self, parent: "Inode", name: bytes) -> bytes:
        """The entry of READDIRPLUS; zeroes where the driver is to look for itself, if at all."""
        if name in (b".", b".."):
            return bytes(ENTRY_SIZE)
        try:
            return self._entry(parent, name)
        except OSError:
            return bytes(ENTRY_SIZE)

    # -- DAX --------------------------------------------------------------------------------------

    def _map(self, header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        _, at, length, flags, offset = abi.SETUPMAPPING_IN.unpack_from(body)
        window = self._window(at | length | offset)
        writable = bool(flags & abi.MAPPING_WRITE)
        if writable and self._readonly:
            raise OSError(errno.EROFS, "read-only")
        fd = self._files.descriptor(self._inodes[header[0]], os.O_RDWR if writable else os.O_RDONLY)
        try:
            window.map(fd, at, offset, length, writable)
        finally:
            os.close(fd)
        return b""

    def _unmap(self, _header: "Header", body: bytes, _vessel: "Vessel") -> bytes:
        (count,) = abi.REMOVEMAPPING_IN.unpack_from(body)
        entries = body[abi.REMOVEMAPPING_IN.size :]
        if count > len(entries) // abi.REMOVEMAPPING_ONE.size:
            raise OSError(errno.EINVAL, "mappings that are not there")
        for offset, length in abi.REMOVEMAPPING_ONE.iter_unpack(
            entries[: count * abi.REMOVEMAPPING_ONE.size]
        ):
            self._window(offset | length).unmap(offset, length)
        return b""

    def _window(self, numbers: int) -> "Window":
        if self.window is None:
            raise OSError(errno.ENOSYS, "no window")
        if numbers % PAGE:
            raise OSError(errno.EINVAL, "not a page's")
        return self.window


ENTRY_SIZE = abi.ENTRY_OUT.size + abi.ATTRIBUTES.size
SILENT = (abi.FORGET, abi.BATCH_FORGET, abi.INTERRUPT)
CHANGES = (  # what a read-only directory refuses as a whole
    abi.SETATTR, abi.SYMLINK, abi.MKNOD, abi.MKDIR, abi.UNLINK, abi.RMDIR, abi.RENAME, abi.RENAME2, abi.LINK,
    abi.WRITE, abi.SETXATTR, abi.REMOVEXATTR, abi.CREATE, abi.FALLOCATE, abi.COPY_FILE_RANGE,
)  # fmt: skip
HANDLERS: "dict[int, Handler]" = {
    abi.INIT: Session._init,
    abi.DESTROY: Session._destroy,
    abi.FORGET: Session._forget,
    abi.BATCH_FORGET: Session._batch_forget,
    abi.LOOKUP: Session._look_up,
    abi.MKNOD: Session._make_node,
    abi.MKDIR: Session._make_directory,
    abi.SYMLINK: Session._symbolic_link,
    abi.LINK: Session._link,
    abi.READLINK: Session._read_link,
    abi.UNLINK: Session._unlink,
    abi.RMDIR: Session._remove_directory,
    abi.RENAME: Session._rename,
    abi.RENAME2: Session._rename2,
    abi.GETATTR: Session._get_attributes,
    abi.SETATTR: Session._set_attributes,
    abi.STATFS: Session._statistics,
    abi.SETXATTR: Session._set_xattr,
    abi.GETXATTR: Session._get_xattr,
    abi.LISTXATTR: Session._list_xattr,
    abi.REMOVEXATTR: Session._remove_xattr,
    abi.OPEN: Session._open,
    abi.CREATE: Session._create,
    abi.OPENDIR: Session._open_directory,
    abi.RELEASE: Session._release,
    abi.RELEASEDIR: Session._release,
    abi.FLUSH: Session._flush,
    abi.READ: Session._read,
    abi.WRITE: Session._write,
    abi.FSYNC: Session._sync,
    abi.FSYNCDIR: Session._sync_directory,
    abi.SYNCFS: Session._sync_all,
    abi.FALLOCATE: Session._allocate,
    abi.LSEEK: Session._seek,
    abi.COPY_FILE_RANGE: Session._copy,
    abi.SETLK: Session._set_lock,
    abi.SETLKW: Session._await_lock,
    abi.GETLK: Session._get_lock,
    abi.READDIR: Session._read_directory,
    abi.READDIRPLUS: Session._read_directory_plus,
    abi.SETUPMAPPING: Session._map,
    abi.REMOVEMAPPING: Session._unmap,
}


def _answer(vessel: "Vessel", unique: int, error: int, reply: "bytes | int") -> int:
    placed = isinstance(reply, int)
    body = 0 if error else reply if isinstance(reply, int) else len(reply)
    if abi.OUT_HEADER.size + body > vessel.writable_len:
        log.limited(log.DEBUG, "fs: a reply is longer than there is room for")
        error, body, reply = errno.ENOBUFS, 0, b""
    vessel.write(abi.OUT_HEADER.pack(abi.OUT_HEADER.size + body, -error, unique))
    if not placed and isinstance(reply, bytes) and reply:
        vessel.write(reply, abi.OUT_HEADER.size)
    return abi.OUT_HEADER.size + body


def _name(text: bytes) -> bytes:
    """One component, up to the NUL that ends it."""
    name = text.partition(b"\0")[0]
    if not name or name in (b".", b"..") or b"/" in name:
        raise OSError(errno.EINVAL, "not a name")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "too long a name")
    return name


def _names(text: bytes) -> tuple[bytes, bytes]:
    """A name and what follows it: another one, or the target of a link."""
    first, _, rest = text.partition(b"\0")
    second = rest.partition(b"\0")[0]
    return _name(first), second


def _sized(data: bytes, size: int) -> bytes:
    """What an extended attribute is, or how long where nothing but that is asked for."""
    if not size:
        return abi.GETXATTR_OUT.pack(len(data))
    if len(data) > size:
        raise OSError(errno.ERANGE, "more than there is room for")
    return data


def _device(number: int) -> int:
    """A device's number as the kernel tells it, as the C library has it."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)

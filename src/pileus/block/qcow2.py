"""Opening a QCOW2 image: what is allowed, in which mode, on top of what.

Source: QEMU, docs/interop/qcow2.rst.
"""

import os
import stat
from _thread import get_ident

from pileus.block._image import Image
from pileus.block._qcow2 import Qcow2Image
from pileus.block._qcow2_writer import Qcow2Writer
from pileus.block._transfer import direct_alignment, read_bytes, write_bytes
from pileus.block.qcow2_header import (
    AUTOCLEAR_FEATURES_AT,
    CORRUPT,
    DIRTY,
    MAX_CLUSTER_BITS,
    MAX_SIZE,
    Header,
)
from pileus.block.qcow2_snapshots import find_snapshot, read_snapshots
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MAX_DEPTH = 64  # images on top of one another

# The images that are being opened, by thread: an opener of backing files comes back here for the next.
_opening: dict[int, list[tuple[int, int]]] = {}


def open_qcow2(
    fd: int,
    path: str,
    *,
    readonly: bool,
    direct: bool,
    open_backing: "Callable[[str, str | None], Image]",
    snapshot: str | None = None,
) -> Image:
    """The disk in the open file ``fd``, which is this function's to close, on errors, too.

    ``open_backing(path, format)`` opens a backing file for reading. Its format is what the image says,
    None where it says nothing; a relative path has been joined to the image's directory. ``snapshot``
    is the ID or name of an internal snapshot, which is readable only. ``direct``: ``fd`` is O_DIRECT.

    Raises HostError.
    """
    try:
        return _open(fd, path, readonly, direct, open_backing, snapshot)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, (OSError, ValueError)):
            raise HostError("open", path, error) from error
        if isinstance(error, MemoryError):
            raise HostError("open", path, "there is no memory for its tables") from error
        raise


def _open(
    fd: int,
    path: str,
    readonly: bool,
    direct: bool,
    open_backing: "Callable[[str, str | None], Image]",
    snapshot: str | None,
) -> Image:
    align = direct_alignment(fd) if direct else 1

    def read(offset: int, length: int) -> bytes:
        return read_bytes(fd, align, offset, length)

    header = Header(_first_cluster(fd, read))
    if header.cluster_size < align:
        raise ValueError(
            f"its clusters of {header.cluster_size} bytes are too small for direct I/O, by {align}"
        )
    if not readonly:
        _check_writable(header)
    snapshots = read_snapshots(header, read) if header.snapshot_count and (snapshot or not readonly) else []
    size, l1 = header.size, (header.l1_offset, header.l1_size)
    if snapshot is not None:
        if not readonly:
            raise ValueError(f"its snapshot {snapshot!r} can be opened only for reading")
        chosen = find_snapshot(snapshots, snapshot)
        size, l1 = chosen.size, chosen.l1
        if size > MAX_SIZE:
            raise ValueError(f"its snapshot {snapshot!r} has a disk of {size} bytes")
        header.check_l1(*l1, size, f"the L1 table of its snapshot {snapshot!r}")
    backing = _open_backing(fd, path, header, open_backing)
    try:
        size = -(-size // 512) * 512
        if readonly:
            return Qcow2Image(fd, path, header, size=size, l1=l1, direct=direct, align=align, backing=backing)
        extensible = stat.S_ISREG(os.fstat(fd).st_mode)
        image = Qcow2Writer(
            fd,
            path,
            header,
            size=size,
            l1=l1,
            direct=direct,
            align=align,
            extensible=extensible,
            backing=backing,
        )
        if header.autoclear:
            # What these describe (dirty bitmaps, say) goes stale with the first write.
            write_bytes(fd, align, AUTOCLEAR_FEATURES_AT, bytes(8))
            os.fdatasync(fd)
    except BaseException:
        if backing is not None:
            backing.close()
        raise
    return image


def _first_cluster(fd: int, read: "Callable[[int, int], bytes]") -> bytes:
    """As much of it as the file has."""
    end = os.lseek(fd, 0, os.SEEK_END)
    # The largest cluster takes 2 MiB, but a header, its extensions and a name fit into less.
    start = read(0, min(end, 4096))
    bits = int.from_bytes(start[20:24], "big")
    if len(start) < 4096 or not 12 < bits <= MAX_CLUSTER_BITS:
        return start
    return read(0, min(end, 1 << bits))


def _check_writable(header: Header) -> None:
    if header.incompatible & CORRUPT:
        raise ValueError(
            "it is marked corrupt; it can be opened for reading, or mended by qemu-img check -r all"
        )
    if header.incompatible & DIRTY:
        raise ValueError(
            "its refcounts may be wrong (it is marked dirty); it can be opened for reading, or mended by "
            "qemu-img check -r all"
        )


def _open_backing(
    fd: int, path: str, header: Header, open_backing: "Callable[[str, str | None], Image]"
) -> Image | None:
    if header.backing_path is None:
        return None
    chain = _opening.setdefault(get_ident(), [])
    status = os.fstat(fd)
    identity = (status.st_dev, status.st_ino)
    if identity in chain:
        raise ValueError("it is its own backing file, by way of others")
    if len(chain) >= MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_DEPTH} backing files on top of one another")
    chain.append(identity)
    try:
        return open_backing(backing_path(path, header.backing_path), header.backing_format)
    finally:
        chain.pop()
        if not chain:
            del _opening[get_ident()]


def backing_path(path: str, name: str) -> str:
    """The file that an image at ``path`` means by ``name``. Raises ValueError for what is no file."""
    name = name.removeprefix("file:")
    protocol, colon, _ = name.partition(":")
    if colon and "/" not in protocol:
        raise ValueError(f"its backing file {name!r} is not a path of a file")
    return os.path.join(os.path.dirname(path), name)

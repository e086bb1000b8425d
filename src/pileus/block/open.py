"""Opening a disk image: finds out its format, locks it, and hands it to what knows that format."""

import os

from pileus.block._raw import QCOW2_MAGIC, RawImage
from pileus.block.lock import lock
from pileus.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.block._image import Image

RAW, QCOW2 = FORMATS = ("raw", "qcow2")
PROBE_SIZE = 4096  # O_DIRECT reads whole blocks into aligned memory


def open_image(
    path: str,
    *,
    readonly: bool = False,
    direct: bool = False,
    format: str | None = None,
    fd: int | None = None,
) -> "Image":
    """The disk in the file or block device at ``path``, locked; the caller closes it.

    ``format`` is one of FORMATS, None to see what it looks like. ``direct`` goes around the page cache.
    With ``fd``, an open descriptor that fits these and is taken over, ``path`` is only its name.
    Raises HostError, and ConfigError for a format that there is not.
    """
    if format not in (None, *FORMATS):
        raise ConfigError("image_type", format, f"known are {' and '.join(FORMATS)}")
    fd = open_file(path, readonly, direct) if fd is None else _adopt(fd, path)
    try:
        lock(fd, path, readonly=readonly)
        kind = format or _probe(fd, path)
        if kind == QCOW2:
            from pileus.block.qcow2 import open_qcow2
    except BaseException:
        os.close(fd)
        raise
    if kind == QCOW2:
        return open_qcow2(fd, path, readonly=readonly, direct=direct, open_backing=_opener(direct))
    try:
        return RawImage(fd, path, readonly=readonly, direct=direct, probed=format is None)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, (OSError, ValueError)):
            raise HostError("open", path, error) from error
        raise


def open_file(path: str, readonly: bool, direct: bool) -> int:
    """A descriptor of the image at ``path``. Raises HostError."""
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not keep us waiting …
        os.set_blocking(fd, True)  # … and a disk may
    except OSError as error:
        raise HostError("open", path, error) from error
    return fd


def _adopt(fd: int, path: str) -> int:
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise HostError("open", path, error) from error
    return fd


def _probe(fd: int, path: str) -> str:
    from pileus.block._transfer import read_bytes

    try:
        start = read_bytes(fd, PROBE_SIZE, 0, len(QCOW2_MAGIC))
    except OSError as error:
        raise HostError("open", path, error) from error
    return QCOW2 if start == QCOW2_MAGIC else RAW


def _opener(direct: bool) -> "Callable[[str, str | None], Image]":
    """What opens the backing files of an image: for reading, locked against writers."""

    def open_backing(path: str, format: str | None) -> "Image":
        if format not in (None, *FORMATS):
            raise HostError("open", path, f"it is said to be {format}; known are {' and '.join(FORMATS)}")
        return open_image(path, readonly=True, direct=direct, format=format)

    return open_backing

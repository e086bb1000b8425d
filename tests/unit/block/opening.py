"""Opening images as the tests do."""

import os
from pathlib import Path

from pileus.block._image import Image
from pileus.block.qcow2 import open_qcow2
from pileus.testing._image import RawReader


def open_image(
    path: str | Path,
    *,
    readonly: bool = False,
    direct: bool = False,
    form: str = "qcow2",
    snapshot: str | None = None,
) -> Image:
    """Backing files without a format are raw."""
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    fd = os.open(path, flags | os.O_CLOEXEC)
    if form == "raw":
        return RawReader(fd, str(path))
    return open_qcow2(
        fd,
        str(path),
        readonly=readonly,
        direct=direct,
        snapshot=snapshot,
        open_backing=lambda name, form: open_image(name, readonly=True, direct=direct, form=form or "raw"),
    )

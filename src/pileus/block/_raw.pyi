from pileus.block._image import Image

QCOW2_MAGIC: bytes

class RawImage(Image):
    def __init__(self, fd: int, path: str, *, readonly: bool, direct: bool, probed: bool) -> None: ...

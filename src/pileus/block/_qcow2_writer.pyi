from pileus.block._image import Image
from pileus.block._qcow2 import Layout, Qcow2Image

class Qcow2Writer(Qcow2Image):
    def __init__(
        self,
        fd: int,
        path: str,
        header: Layout,
        *,
        size: int,
        l1: tuple[int, int],
        direct: bool,
        align: int,
        extensible: bool,
        backing: Image | None,
    ) -> None: ...

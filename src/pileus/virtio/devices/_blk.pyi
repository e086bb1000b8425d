from collections.abc import Callable

from pileus.block._image import Image
from pileus.virtio.queue import Queue
from pileus.virtio.queue._engine import Engine

MAX_SEGMENTS: int

class BlkQueue(Engine):
    writethrough: bool
    io: str
    requests: int
    errors: int
    @property
    def fault(self) -> str | None: ...
    def __init__(
        self,
        name: str,
        queue: Queue,
        image: Image,
        serial: bytes,
        failed: Callable[[int], None],
        threads: bool = False,
    ) -> None: ...

def flush(image: Image) -> None: ...

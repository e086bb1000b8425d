from collections.abc import Callable

from pileus.virtio.queue import Queue
from pileus.virtio.queue._engine import Engine

BUFFER_SIZE: int
CONNECTION_LIMIT: int

class Muxer(Engine):
    rx_bytes: int
    tx_bytes: int
    dropped: int
    refused: int
    connections: int
    fault: str | None
    def __init__(
        self,
        name: str,
        failed: Callable[[int], None],
        rx: Queue,
        tx: Queue,
        listener: int,
        path: bytes,
        cid: int,
        line_ms: int,
        guest_ms: int,
        linger_ms: int,
    ) -> None: ...
    def disconnect(self) -> None: ...

from collections.abc import Callable

from pileus.virtio.queue import Queue
from pileus.virtio.queue._engine import Engine

class Pair(Engine):
    hold_ms: int
    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int
    fault: str | None
    def __init__(self, name: str, failed: Callable[[int], None], rx: Queue, tx: Queue, tap: int) -> None: ...
    def configure(
        self, mergeable: bool, guest_csum: bool, csum: bool, gso_types: int, gso_ecn: bool
    ) -> None: ...
    def forward(self, source: int, target: int) -> None: ...

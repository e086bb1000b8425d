from pileus.memory import GuestMemory
from pileus.virtio.queue import Queue

RANGES: list[tuple[int, int]]

class HostileDriver:
    memory: GuestMemory
    queue: Queue
    indirect: bool
    event_idx: bool
    start: int
    rings: int
    chains: int
    completed: int
    faults: dict[str, int]
    def __init__(self, memory: GuestMemory, seed: int = 1) -> None: ...
    def feed(self, data: bytes) -> None: ...
    def build(self) -> bool: ...
    def run(self, count: int) -> int: ...
    def scribble(self, count: int) -> None: ...
    def close(self) -> None: ...

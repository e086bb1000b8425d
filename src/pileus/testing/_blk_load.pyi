from pileus.memory import GuestMemory

class BlkLoad:
    descriptors: int
    available: int
    used: int
    requests: int
    kicks: int
    interrupts: int
    def __init__(
        self,
        memory: GuestMemory,
        kick_fd: int,
        call_fd: int,
        *,
        disk_size: int,
        ring_size: int = 256,
        depth: int = 32,
        block_size: int = 4096,
        sequential: bool = False,
        write: bool = False,
        numbered: bool = False,
        gpa: int = 0,
        event_idx: bool = True,
    ) -> None: ...
    def run(self, seconds: float) -> float: ...

def read_plainly(fd: int, memory: GuestMemory, block_size: int, disk_size: int, seconds: float) -> float: ...

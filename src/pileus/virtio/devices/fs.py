"""virtio-fs: a directory of the host as a file system of the guest.

The queues carry FUSE, which ``pileus.fs`` speaks. A lock that somebody else has is asked for again every few
milliseconds, by a thread that lives as long as one is waited for: the requests behind it go on.

Source: virtio 1.2, 5.11 (File System Device)
"""

import _thread
import struct
import time

from pileus.fs import abi
from pileus.fs.locks import BlockedError
from pileus.fs.session import Session
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.virtio.device import Mapper
    from pileus.virtio.queue import Chain

TAG_SIZE = 36  # bytes, padded with zeroes
CACHE = 0  # 5.11.6.3: the number of the shared memory region
URGENT = 0  # the queue for FORGET and INTERRUPT
LOCK_WAIT = 0.01  # seconds between attempts
MAX_WAITING = 1024  # requests
EINTR, ENOLCK = 4, 37


class Fs(VirtioDevice):
    """``session`` on ``num_queues`` queues, beside the urgent one; this owns it."""

    id = ids.FS

    def __init__(self, name: str, session: Session, tag: str, num_queues: int, queue_size: int) -> None:
        self.queue_sizes = (queue_size,) * (1 + num_queues)
        super().__init__(name)
        self.config = struct.pack(f"<{TAG_SIZE}sI", tag.encode(), num_queues)
        self._session = session
        self._waiting_locks: list[tuple[int, Chain]] = []
        self._awaiting = False  # a thread is

    def activate(self) -> None:
        self._session.window = None if self.mapper is None else FileWindow(self.mapper)

    def handle_queue(self, index: int) -> None:
        queue = self.queues[index]
        for chain in queue:
            if index == URGENT:
                self._interrupted(chain)
            try:
                length = self._session.serve(chain)
            except BlockedError:
                if len(self._waiting_locks) == MAX_WAITING:
                    queue.push_used(chain, _refuse(chain, ENOLCK))
                else:
                    self._await(index, chain)
                continue
            queue.push_used(chain, length)

    def reset(self) -> None:
        self._waiting_locks.clear()
        self._session.clear()

    def close(self) -> None:
        self._waiting_locks.clear()
        super().close()
        self._session.close()

    def _await(self, index: int, chain: "Chain") -> None:
        self._waiting_locks.append((index, chain))
        if not self._awaiting:
            self._awaiting = True
            _thread.start_new_thread(self._try_again, ())

    def _try_again(self) -> None:
        while True:
            time.sleep(LOCK_WAIT)
            with self.lock:
                if not self._waiting_locks:
                    self._awaiting = False
                    return
                if not self.paused and not self.failed:
                    self._try_each()

    def _try_each(self) -> None:
        for each in tuple(self._waiting_locks):
            try:
                length = self._session.serve(each[1])
            except BlockedError:
                continue
            self._done(each, length)

    def _interrupted(self, request: "Chain") -> None:
        """INTERRUPT: a process waits no more."""
        head = request.read(abi.IN_HEADER.size + abi.INTERRUPT_IN.size)
        if len(head) < abi.IN_HEADER.size + abi.INTERRUPT_IN.size:
            return
        if abi.IN_HEADER.unpack_from(head)[1] != abi.INTERRUPT:
            return
        (unique,) = abi.INTERRUPT_IN.unpack_from(head, abi.IN_HEADER.size)
        for each in tuple(self._waiting_locks):
            if abi.IN_HEADER.unpack(each[1].read(abi.IN_HEADER.size))[2] == unique:
                self._done(each, _refuse(each[1], EINTR))

    def _done(self, waiting: "tuple[int, Chain]", length: int) -> None:
        index, chain = waiting
        self._waiting_locks.remove(waiting)
        self.queues[index].push_used(chain, length)
        self.queues[index].notify()


class FileWindow:
    """The first region of shared memory, which the driver has files mapped in."""

    def __init__(self, mapper: "Mapper") -> None:
        self._mapper = mapper

    def map(self, fd: int, at: int, offset: int, length: int, writable: bool) -> None:
        self._mapper.map(CACHE, fd, at, offset, length, writable)

    def unmap(self, offset: int, length: int) -> None:
        self._mapper.unmap(CACHE, offset, length)


def _refuse(chain: "Chain", error: int) -> int:
    unique = abi.IN_HEADER.unpack(chain.read(abi.IN_HEADER.size))[2]
    return chain.write(abi.OUT_HEADER.pack(abi.OUT_HEADER.size, -error, unique))

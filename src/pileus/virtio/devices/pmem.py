"""virtio-pmem: tells the guest where its persistent memory is, and makes durable what it stored there.

Source: virtio 1.2, 5.19 (PMEM Device)
"""

import _thread
from struct import Struct

from pileus import log
from pileus.errors import GuestError
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.virtio.queue import Chain

REQUESTQ = 0
CONFIG = Struct("<QQ")  # start, size
WORD = Struct("<I")  # a request is its type, an answer its result: 5.19.6
FLUSH = 0
OK, EIO = WORD.pack(0), WORD.pack(1)


class Pmem(VirtioDevice):
    """``size`` bytes at ``gpa``, mapped there by others. ``sync`` makes them durable or raises OSError.

    That takes the host's disk as long as it takes, so that it has a thread of its own, from the first request
    on; one call serves all that were there when it began. No reset and no pause waits for it: what it has
    done is then forgotten, and requests that were under way are served again on resume.
    """

    id = ids.PMEM
    queue_sizes = (64,)

    def __init__(self, name: str, gpa: int, size: int, sync: "Callable[[], None]") -> None:
        super().__init__(name)
        self.config = CONFIG.pack(gpa, size)
        self._sync = sync
        self._under_way: list[tuple[Chain, int]] = []  # and the type of each, the oldest first
        self._epoch = 0  # of ``_under_way``: what was taken out of it in another one is void
        self._flushes = 0
        self._started = self._closing = False
        self._news = _thread.allocate_lock()  # released when there is something to do
        self._news.acquire()
        self._alive = _thread.allocate_lock()  # held while the thread lives

    # -- the control loop's side ------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        try:
            for chain in self.queues[index]:
                if chain.readable_len < WORD.size or chain.writable_len < WORD.size:
                    raise GuestError("a request has a type to read and a result to write (5.19.6)")
                self._under_way.append((chain, WORD.unpack(chain.read(WORD.size))[0]))
        finally:
            if self._under_way:
                self._wake()

    def reset(self) -> None:
        self._forget()

    def pause(self) -> None:
        """Requests under way go back into the ring, from which they are taken anew."""
        with self.lock:
            super().pause()
            if self._under_way:
                for chain, _ in reversed(self._under_way):
                    self.queues[REQUESTQ].unpop(chain)
                self._waiting.add(REQUESTQ)
            self._forget()

    def counters(self) -> "dict[str, int]":
        return {"flushes": self._flushes}

    def close(self) -> None:
        """Waits for a flush that is under way: what it flushes is about to be unmapped."""
        with self.lock:
            self._forget()
            self._closing = True
            if self._started:
                self._wake()
        with self._alive:
            super().close()

    def _forget(self) -> None:
        self._epoch += 1
        self._under_way.clear()

    def _wake(self) -> None:
        if not self._started and not self._closing:
            self._alive.acquire()
            try:
                _thread.start_new_thread(self._work, ())
            except BaseException:
                self._alive.release()
                raise
            self._started = True
        if self._news.locked():
            self._news.release()

    # -- the thread's side ------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                self._news.acquire()
                with self.lock:
                    if self._closing:
                        return
                    epoch, count = self._epoch, len(self._under_way)
                if count:
                    self._answer(epoch, count, self._flush())
        finally:
            self._alive.release()

    def _flush(self) -> bytes:
        try:
            self._sync()
        except OSError as error:
            log.limited(log.ERROR, f"{self.name}: cannot make its memory durable: {error.strerror}")
            return EIO
        return OK

    def _answer(self, epoch: int, count: int, result: bytes) -> None:
        """Those that were there before the flush began, unless the driver has gone or is paused."""
        with self.lock:
            if epoch != self._epoch or self.failed:
                return
            queue = self.queues[REQUESTQ]
            for chain, kind in self._under_way[:count]:
                queue.push_used(chain, chain.write(result if kind == FLUSH else EIO))
            del self._under_way[:count]
            self._flushes += 1
            queue.notify()

"""virtio-rng: host entropy for the guest.

Source: virtio 1.2, 5.4 (Entropy Device): one queue, no feature bits, no config space.
"""

import os
import stat

from pileus import log
from pileus.errors import GuestError, HostError
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.virtio.queue import Chain

REQUESTQ = 0
MAX_REQUEST = 64 * 1024  # bytes per chain, which may name the same page many times
BUDGET = 1 << 20  # bytes per kick


class Rng(VirtioDevice):
    """Fills each request from ``source``, a function of a byte count (default: getrandom)."""

    id = ids.RNG
    queue_sizes = (256,)

    def __init__(self, name: str, source: "Callable[[int], bytes]" = os.getrandom) -> None:
        super().__init__(name)
        self._source = source

    def handle_queue(self, index: int) -> None:
        queue, budget = self.queues[index], BUDGET
        for chain in queue:
            count = self._fill(chain)
            queue.push_used(chain, count)
            budget -= count
            if budget <= 0:
                self.serve_again(index)
                break

    def _fill(self, chain: "Chain") -> int:
        """Return the bytes written: fewer than asked is allowed, none is not (5.4.6.2)."""
        if chain.readable_len or not chain.writable_len:
            raise GuestError("a request is device-writable only (5.4.6.1)")
        return chain.write(self._source(min(chain.writable_len, MAX_REQUEST)))


class FileSource:
    """Entropy from a file or a character device; a file that ends begins anew.

    It never waits and never fails: where the source has nothing to give, the kernel's own generator helps
    out, with a warning. Raises HostError for what cannot be a source at all.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError("read entropy from", path, error) from error
        self._path = path
        status = os.fstat(self._fd)
        if stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and not status.st_size):
            self.close()
            reason = "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is empty"
            raise HostError("read entropy from", path, reason)

    def __call__(self, count: int) -> bytes:
        """1 to ``count`` bytes."""
        try:
            data = os.read(self._fd, count)
            if not data:
                os.lseek(self._fd, 0, os.SEEK_SET)
                data = os.read(self._fd, count)
            reason = "it has come to its end"
        except OSError as error:  # a pipe that cannot go back, a device that has to wait, or is gone
            data, reason = b"", os.strerror(error.errno or 0)
        if not data:
            log.limited(log.WARNING, f"no entropy from {self._path}, {reason}: the kernel's is used instead")
            data = os.getrandom(count)
        return data

    def close(self) -> None:
        """Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

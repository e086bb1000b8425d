"""virtio-rng: host entropy for the guest.

Source: virtio 1.2, 5.4 (Entropy Device): one queue, no feature bits, no config space.
"""

import os

from pileus.errors import GuestError, HostError
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.virtio.queue import Chain

REQUESTQ = 0
MAX_REQUEST = 64 * 1024  # bytes per chain, which may name the same page many times


class Rng(VirtioDevice):
    """Fills each request from ``source``, a function of a byte count (default: getrandom)."""

    id = ids.RNG
    queue_sizes = (256,)

    def __init__(self, name: str, source: "Callable[[int], bytes]" = os.getrandom) -> None:
        super().__init__(name)
        self._source = source

    def handle_queue(self, index: int) -> None:
        queue = self.queues[index]
        for chain in queue:
            queue.push_used(chain, self._fill(chain))

    def _fill(self, chain: "Chain") -> int:
        """Return the bytes written: fewer than asked is allowed, none is not (5.4.6.2)."""
        if chain.readable_len or not chain.writable_len:
            raise GuestError("a request is device-writable only (5.4.6.1)")
        return chain.write(self._source(min(chain.writable_len, MAX_REQUEST)))


class FileSource:
    """Entropy from a file or a character device; a file that ends begins anew."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError("read entropy from", path, error) from error
        self._path = path

    def __call__(self, count: int) -> bytes:
        data = os.read(self._fd, count)
        if not data:
            os.lseek(self._fd, 0, os.SEEK_SET)
            data = os.read(self._fd, count)
        return data

    def close(self) -> None:
        os.close(self._fd)

"""A shared directory that a vhost-user back-end serves.

With *DAX* the guest's kernel has parts of files mapped into a window of its memory, instead of reading them.
The window is this process's; the back-end says on its channel which part of which file belongs where.

Source: virtio 1.2, 5.11 (File System Device); vhost-user specification, VHOST_USER_BACKEND_SHMEM_MAP
"""

import struct

from pileus import log
from pileus.memory._window import FileWindow
from pileus.vhost_user import protocol
from pileus.vhost_user.devices.device import PATIENCE, VhostUserDevice
from pileus.vhost_user.frontend import UNDERSTOOD
from pileus.vhost_user.protocol import BackendRequest, Feature
from pileus.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.vhost_user.devices.device import Loop, Peer
    from pileus.vhost_user.frontend import Frontend
    from pileus.vhost_user.protocol import Message

TAG_SIZE = 36  # bytes, padded with zeroes
CACHE = 0  # the number of the window among the regions of shared memory
PAGE = 4096


class VhostUserFs(VhostUserDevice):
    """The guest mounts ``tag``. Queue 0 is for urgent requests, ``num_queues`` others for all the rest.

    ``cache_size`` is how large the window is at most, 0 for none; a back-end that has none makes it none.
    """

    id = ids.FS

    def __init__(
        self,
        name: str,
        option: str,
        peer: "Peer",
        loop: "Loop",
        *,
        tag: str,
        num_queues: int = 1,
        queue_size: int = 1024,
        cache_size: int = 0,
        patience: float = PATIENCE,
    ) -> None:
        self.queue_sizes = (queue_size,) * (1 + num_queues)
        self.wanted = int(UNDERSTOOD | (Feature.SHMEM if cache_size else 0))
        self._cache_size = cache_size
        super().__init__(name, option, peer, loop, patience)
        self.config = struct.pack(f"<{TAG_SIZE}sI", tag.encode(), num_queues)

    def refresh(self, frontend: "Frontend") -> bytes:
        """The window is made once, with the first back-end: a guest does not see it come or go."""
        if self._cache_size and not self.windows:
            sizes = frontend.shared_memory()
            size = min(self._cache_size, sizes[CACHE] if sizes else 0)
            self._cache_size = 0
            if size >= PAGE:
                self.windows = (FileWindow(1 << size.bit_length() - 1),)
            else:
                log.info(f"{self.name}: its back-end has no window for files (DAX)")
        return self.config

    def answer(self, message: "Message", fds: "list[int]") -> bool:
        if message.request not in (BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP):
            return super().answer(message, fds)
        region, at, offset, length, flags = message.values
        if region >= len(self.windows):
            return False
        try:
            if message.request == BackendRequest.SHMEM_MAP:
                self.windows[region].map(fds[0], at, offset, length, bool(flags & protocol.MAP_WRITABLE))
            else:
                self.windows[region].unmap(offset, length)
        except OSError as error:
            log.limited(log.WARNING, f"{self.name}: {length:#x} bytes at {offset:#x} of its window: {error}")
            return False
        return True

    def reset(self) -> None:
        super().reset()
        for window in self.windows:
            window.clear()

    def close(self) -> None:
        super().close()
        for window in self.windows:
            window.close()

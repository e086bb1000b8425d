"""A shared directory that a vhost-user back-end serves.

Source: virtio 1.2, 5.11 (File System Device)
"""

import struct

from pileus.vhost_user.devices.device import PATIENCE, VhostUserDevice
from pileus.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.vhost_user.devices.device import Loop, Peer

TAG_SIZE = 36  # bytes, padded with zeroes


class VhostUserFs(VhostUserDevice):
    """The guest mounts ``tag``. Queue 0 is for urgent requests, ``num_queues`` others for all the rest."""

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
        patience: float = PATIENCE,
    ) -> None:
        self.queue_sizes = (queue_size,) * (1 + num_queues)
        super().__init__(name, option, peer, loop, patience)
        self.config = struct.pack(f"<{TAG_SIZE}sI", tag.encode(), num_queues)

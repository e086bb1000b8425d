"""A disk that a vhost-user back-end serves.

Source: virtio 1.2, 5.2 (Block Device)
"""

from pileus.vhost_user.devices.device import PATIENCE, VhostUserDevice
from pileus.vhost_user.protocol import Feature
from pileus.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.vhost_user.devices.device import Loop, Peer
    from pileus.vhost_user.frontend import Frontend

SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH = (1 << bit for bit in (1, 2, 4, 5, 6, 9))
TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES = (1 << bit for bit in (10, 11, 12, 13, 14))
CONFIG_SIZE = 60  # struct virtio_blk_config up to what WRITE_ZEROES brought
SEG_MAX_AT, WRITEBACK_AT, NUM_QUEUES_AT = 12, 32, 34


class VhostUserBlk(VhostUserDevice):
    """``num_queues`` queues of ``queue_size``; ``wce`` lets the driver turn the write cache off and on."""

    id = ids.BLOCK
    needed = Feature.CONFIG

    def __init__(
        self,
        name: str,
        option: str,
        peer: "Peer",
        loop: "Loop",
        *,
        num_queues: int = 1,
        queue_size: int = 128,
        wce: bool = True,
        patience: float = PATIENCE,
    ) -> None:
        self.queue_sizes = (queue_size,) * num_queues
        self.known = SIZE_MAX | SEG_MAX | GEOMETRY | RO | BLK_SIZE | FLUSH | TOPOLOGY | DISCARD | WRITE_ZEROES
        self.known |= (CONFIG_WCE if wce else 0) | (MQ if num_queues > 1 else 0)
        super().__init__(name, option, peer, loop, patience)

    def refresh(self, frontend: "Frontend") -> bytes:
        """The back-end's, but for what the rings here limit: their number, and how much fits into one."""
        config = bytearray(frontend.config(CONFIG_SIZE))
        _lower(config, SEG_MAX_AT, 4, self.queue_sizes[0] - 2)
        config[NUM_QUEUES_AT : NUM_QUEUES_AT + 2] = len(self.queues).to_bytes(2, "little")
        if self.config:
            config[WRITEBACK_AT] = self.config[WRITEBACK_AT]  # the driver's to say
        return bytes(config)

    def write_config(self, offset: int, data: bytes) -> None:
        """Only ``writeback`` can be written, and only what the specification knows."""
        if offset != WRITEBACK_AT or len(data) != 1 or data[0] > 1 or not self.driver_features & CONFIG_WCE:
            return
        config = bytearray(self.config)
        config[WRITEBACK_AT] = data[0]
        self.config = bytes(config)
        self._try(lambda frontend: frontend.set_config(WRITEBACK_AT, data))

    def taken_up(self, frontend: "Frontend") -> None:
        """Another back-end does not know what the driver wrote."""
        if self.driver_features & CONFIG_WCE:
            frontend.set_config(WRITEBACK_AT, self.config[WRITEBACK_AT : WRITEBACK_AT + 1])


def _lower(config: bytearray, offset: int, size: int, most: int) -> None:
    value = int.from_bytes(config[offset : offset + size], "little")
    config[offset : offset + size] = min(value, most).to_bytes(size, "little")

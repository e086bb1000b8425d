"""A network interface that a vhost-user back-end serves.

The MAC address and the number of pairs in use are matters of this side: the back-end has no control queue,
and learns of pairs by which rings are enabled.

Source: virtio 1.2, 5.1 (Network Device); vhost-user specification, Multiple queue support
"""

import os
import select
import struct

from pileus.errors import GuestError
from pileus.vhost_user.devices.device import PATIENCE, VhostUserDevice
from pileus.vhost_user.frontend import RUNNING
from pileus.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.vhost_user.devices.device import Loop, Peer
    from pileus.vhost_user.frontend import Frontend
    from pileus.virtio.device import State
    from pileus.virtio.queue import Chain

MTU, MAC, STATUS, CTRL_VQ, MQ = (1 << bit for bit in (3, 5, 16, 17, 22))
CHECKSUMS = sum(1 << bit for bit in (0, 1))
SEGMENTS = sum(1 << bit for bit in (7, 8, 9, 11, 12, 13))  # of TCP: TSO4, TSO6 and ECN, each way
UDP = sum(1 << bit for bit in (10, 14, 54, 55, 56))  # UFO and USO, each way
MRG_RXBUF = 1 << 15

LINK_UP = 1
CONTROL_QUEUE_SIZE = 64
MQ_CLASS, VQ_PAIRS_SET = 4, 0
OK, ERR = 0, 1  # what a control command is answered


class VhostUserNet(VhostUserDevice):
    """``num_queues`` queues in pairs, of ``queue_size``; a control queue with more than one pair.

    ``withheld`` are feature bits that are not to be offered, ``mtu`` what the driver is told of.
    """

    id = ids.NET

    def __init__(
        self,
        name: str,
        option: str,
        peer: "Peer",
        loop: "Loop",
        *,
        mac: bytes,
        mtu: int | None = None,
        num_queues: int = 2,
        queue_size: int = 256,
        withheld: int = 0,
        patience: float = PATIENCE,
    ) -> None:
        self.pair_count = num_queues // 2
        self.active_pairs = 1
        self.queue_sizes = (queue_size,) * num_queues
        self.known = (CHECKSUMS | SEGMENTS | UDP | MRG_RXBUF) & ~withheld
        if self.pair_count > 1:
            self.queue_sizes += (CONTROL_QUEUE_SIZE,)
            self.kicked_in_python = (num_queues,)
        super().__init__(name, option, peer, loop, patience)
        self.config = struct.pack("<6sHHH", mac, LINK_UP, self.pair_count, mtu or 0)[: 12 if mtu else 10]
        self._ours = MAC | STATUS | (MTU if mtu else 0)
        self._forwarded = False

    @property
    def offered(self) -> int:
        return super().offered | self._ours | (CTRL_VQ | MQ if self.pair_count > 1 else 0)

    @property
    def data_queues(self) -> int:
        return 2 * self.pair_count

    @property
    def queue_groups(self) -> int:
        """Back-ends of interfaces count pairs where they are asked for queues, as DPDK does; some do not."""
        return self.pair_count

    @property
    def control_index(self) -> int:
        """A driver without MQ expects the control queue behind the first pair (5.1.2)."""
        return 2 * self.pair_count if self.driver_features & MQ else 2

    def backend_features(self) -> int:
        return self.driver_features & ~(self._ours | CTRL_VQ | MQ)

    def served(self, index: int) -> bool:
        pairs = self.pair_count if self.driver_features & MQ else 1
        return index < 2 * pairs and super().served(index)

    def enabled(self, index: int) -> bool:
        return index // 2 < self.active_pairs

    def activate(self) -> None:
        if self.driver_features & CTRL_VQ and self.control_index == 2:
            self._loop.watch(self.queues[2].kick_fd, select.EPOLLIN, lambda _: self._control_kicked())
            self._forwarded = True
        super().activate()

    def reset(self) -> None:
        super().reset()
        if self._forwarded:
            self._loop.unwatch(self.queues[2].kick_fd)
            self._forwarded = False
        self.active_pairs = 1

    def state(self) -> "State":
        super().state()
        return {"pairs": self.active_pairs}

    def restore(self, state: "State") -> None:
        self.active_pairs = state["pairs"]

    def _control_kicked(self) -> None:
        try:
            os.eventfd_read(self.queues[2].kick_fd)
        except BlockingIOError:
            return
        self.kicked(2)

    # -- the control queue ------------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        queue = self.queues[index]
        for chain in queue:
            queue.push_used(chain, self._answer_command(chain))

    def _answer_command(self, chain: "Chain") -> int:
        if not chain.writable_len:
            raise GuestError("a control command has no room for its answer (5.1.6.5)")
        command = chain.read(5)
        set_pairs = command[:2] == bytes([MQ_CLASS, VQ_PAIRS_SET]) and len(command) == 4
        done = set_pairs and self._set_pairs(int.from_bytes(command[2:], "little"))
        return chain.write(bytes([OK if done else ERR]))

    def _set_pairs(self, count: int) -> bool:
        if not self.driver_features & MQ or not 1 <= count <= self.pair_count:
            return False
        if not all(queue.active for queue in self.queues[: 2 * count]):
            return False
        before, self.active_pairs = self.active_pairs, count
        self._try(lambda frontend: self._enable(frontend, before))
        return True

    def _enable(self, frontend: "Frontend", before: int) -> None:
        """Rings of the pairs between ``before`` and now; a later back-end learns it as it starts."""
        for index in range(2 * min(before, self.active_pairs), 2 * max(before, self.active_pairs)):
            if self.served(index) and frontend.state == RUNNING:
                frontend.enable(index, self.enabled(index))

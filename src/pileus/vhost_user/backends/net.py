"""A network interface, as a back-end offers it: the device of a VM without what is its front-end's.

The front-end has MAC address, link state and control queue, and tells how many pairs are in use by which
rings it enables.

Source: vhost-user specification, Multiple queue support
"""

from pileus.config.model import NetConfig
from pileus.virtio.devices.net import ALWAYS as OURS_WITHIN_A_VM
from pileus.virtio.devices.net import CTRL_VQ, MQ, MRG_RXBUF, Net, open_net

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.backends import NetBackendConfig
    from pileus.net.tap import Tap

DEFAULT_IP, DEFAULT_MASK = "192.168.100.1", "255.255.255.0"  # on a TAP that is made here
FRONT_ENDS = OURS_WITHIN_A_VM & ~MRG_RXBUF  # features that it has to itself
NAMED = CTRL_VQ | MQ  # of them, those that front-ends want to see offered, nevertheless


class BackendNet(Net):
    """The pairs of ``tap``, each of which serves while its rings are live."""

    in_order = True

    def __init__(self, name: str, tap: "Tap", mac: bytes, **about: int) -> None:
        super().__init__(name, tap, mac, **about)
        self.features = self.features & ~FRONT_ENDS | (NAMED if self.pair_count > 1 else 0)
        self.kicked_in_python = ()
        self.queues.pop().close()  # the control queue's

    @property
    def queue_groups(self) -> int:
        """Front-ends ask for pairs."""
        return self.pair_count

    def activate(self) -> None:
        self.driver_features &= ~NAMED  # there is nothing to do for these
        super().activate()
        self._run(self._live_pairs())

    def resume(self) -> None:
        self.active_pairs = self._live_pairs()
        super().resume()

    def _live_pairs(self) -> int:
        """Those up to the last that has a ring to serve."""
        live = [index for index in range(self.pair_count) if self._is_live(index)]
        return live[-1] + 1 if live else 0

    def _is_live(self, index: int) -> bool:
        return any(queue.active for queue in self.queues[2 * index : 2 * index + 2])


def open_interface(config: "NetBackendConfig") -> Net:
    """The interface that ``config`` describes. Raises HostError, and nothing is left."""
    made = config.tap is None and config.fd is None
    return open_net(
        NetConfig(
            tap=config.tap,
            fd=config.fd,
            ip=config.ip or (DEFAULT_IP if made else None),
            mask=config.mask or (DEFAULT_MASK if made and config.ip is None else None),
            host_mac=config.host_mac,
            mtu=config.mtu,
            num_queues=config.num_queues,
            queue_size=config.queue_size,
            id=config.id or "pileus-net",
            offload_csum=config.offload_csum,
            offload_tso=config.offload_tso,
            offload_ufo=config.offload_ufo,
        ),
        0,
        BackendNet,
    )

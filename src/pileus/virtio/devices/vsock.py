"""virtio-vsock over Unix sockets: this module listens and negotiates, ``_vsock`` moves packets.

A client of the host connects to the socket and writes ``CONNECT PORT``, and the guest's connections to its
port N of the host go to the socket at ``PATH_N``. See docs/vsock.md.

Source: virtio 1.2, 5.10 (Socket Device)
"""

import os

from pileus.net.unix_socket import Listener
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice
from pileus.virtio.devices._vsock import BUFFER_SIZE, CONNECTION_LIMIT, Muxer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.model import VsockConfig
    from pileus.virtio.device import State

RX, TX, EVENTS = range(3)
QUEUE_SIZE = 256
STREAM = 1 << 0
TRANSPORT_RESET = bytes(4)  # struct virtio_vsock_event: the one event there is

LINE_MS = 10_000
GUEST_MS = 2_000
LINGER_MS = 30_000

__all__ = ["BUFFER_SIZE", "CONNECTION_LIMIT", "Vsock", "open_vsock"]


class Vsock(VirtioDevice):
    """The guest's sockets, as CID ``cid``. Owns ``listener``, whose path names those of the host's ports too.

    ``line_ms`` bounds how long a client takes to name its port, ``guest_ms`` how long the guest takes to
    answer a request or the end of a connection, and ``linger_ms`` how long a client may read nothing of what
    a guest left for it.
    """

    id = ids.VSOCK
    features = STREAM
    queue_sizes = (QUEUE_SIZE,) * 3
    kicked_in_python = (EVENTS,)

    def __init__(
        self,
        name: str,
        listener: Listener,
        cid: int,
        *,
        line_ms: int = LINE_MS,
        guest_ms: int = GUEST_MS,
        linger_ms: int = LINGER_MS,
    ) -> None:
        super().__init__(name)
        self.cid = cid
        self.listener = listener
        self.config = cid.to_bytes(8, "little")
        self._was_restored = False
        self.muxer = Muxer(
            name,
            lambda number: self.fail(self.muxer.fault or os.strerror(number)),
            self.queues[RX],
            self.queues[TX],
            listener.fd,
            os.fsencode(listener.path),
            cid,
            line_ms,
            guest_ms,
            linger_ms,
        )

    def activate(self) -> None:
        self.muxer.start()

    def reset(self) -> None:
        self.muxer.stop()
        self.muxer.disconnect()
        self._was_restored = False

    def close(self) -> None:
        """Also removes the socket file."""
        self.muxer.close()
        self.muxer.disconnect()
        super().close()
        self.listener.close()

    def state(self) -> "State":
        """Connections are not part of it: their other ends are sockets of this host."""
        return {}

    def restore(self, state: "State") -> None:
        """The guest's connections are gone, and it has to hear so."""
        self._was_restored = True

    def handle_queue(self, index: int) -> None:
        """Buffers for events stay in their queue until there is one to tell (5.10.6.7)."""
        if self._was_restored and (chain := self.queues[index].pop()) is not None:
            self.queues[index].push_used(chain, chain.write(TRANSPORT_RESET))
            self._was_restored = False

    def counters(self) -> "dict[str, int]":
        """Bytes so far, packets that had no proper header, clients and requests beyond the limit."""
        return {name: getattr(self.muxer, name) for name in COUNTERS}


COUNTERS = ("rx_bytes", "tx_bytes", "dropped", "refused")


def open_vsock(config: "VsockConfig") -> Vsock:
    """The device that ``config`` describes. Raises HostError, and nothing is left."""
    listener = Listener(config.socket)
    try:
        return Vsock(config.id or "_vsock0", listener, config.cid)
    except BaseException:
        listener.close()
        raise

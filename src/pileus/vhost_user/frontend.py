"""The front-end's half of one conversation with a back-end: who it is, what it can, and its rings.

``TRANSITIONS`` is what may follow what; a broken connection ends any state, and another Frontend begins anew.

Source: vhost-user specification, Starting and stopping rings; Multiple queue support; Inflight I/O tracking
"""

import os
import socket

from pileus.errors import LocalProtocolError, RemoteProtocolError
from pileus.vhost_user import protocol
from pileus.vhost_user.connection import TIMEOUT, Connection, close_all
from pileus.vhost_user.protocol import Feature, Message, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pileus.memory import GuestMemory
    from pileus.virtio.queue import Queue

STRANGER, IDLE, RUNNING, CLOSED = "stranger", "idle", "running", "closed"
TRANSITIONS = {
    STRANGER: {"negotiate": IDLE, "close": CLOSED},
    IDLE: {"start": RUNNING, "close": CLOSED},
    RUNNING: {"stop": IDLE, "close": CLOSED},
    CLOSED: {"close": CLOSED},
}
UNDERSTOOD = (
    Feature.MQ
    | Feature.LOG_SHMFD
    | Feature.REPLY_ACK
    | Feature.BACKEND_REQ
    | Feature.CONFIG
    | Feature.INFLIGHT_SHMFD
    | Feature.RESET_DEVICE
    | Feature.CONFIGURE_MEM_SLOTS
)
MAX_INFLIGHT = 64 << 20  # bytes of an inflight region; 256 queues of 32768 take half of that


class Ring:
    """A queue that the back-end serves: ``index``, where it goes on (``base``), and whether it may yet."""

    __slots__ = ("base", "enabled", "index", "queue")

    def __init__(self, index: int, queue: "Queue", base: int, enabled: bool = True) -> None:
        self.index = index
        self.queue = queue
        self.base = base
        self.enabled = enabled


class Inflight:
    """Memory in which a back-end notes what it has begun, for the one after it. Owns ``fd``."""

    def __init__(self, fd: int, size: int, offset: int, queues: int, queue_size: int) -> None:
        self.fd = fd
        self.about = (size, offset, queues, queue_size)

    def close(self) -> None:
        os.close(self.fd)


class Frontend:
    """Speaks over ``sock``, which it owns. Any method but ``shut_down`` and ``close`` raises HostError for a
    peer that is gone or slow, RemoteProtocolError for one that does not keep to the protocol or refuses.
    """

    def __init__(self, sock: "socket.socket", peer: str) -> None:
        self.peer = peer
        self.state = STRANGER
        self.features = 0  # of virtio, as the back-end offers them
        self.protocol_features = Feature(0)  # agreed
        self.max_queues: int | None = None  # None: it did not say
        self.requests: Connection | None = None  # on which the back-end asks, if it can
        self._channel = Connection(sock, peer, protocol.FRONTEND, asks=True)
        self._rings: Sequence[Ring] = ()
        self._features = 0  # of virtio, as set
        self._memory: GuestMemory | None = None  # that the back-end knows

    def fileno(self) -> int:
        return self._channel.fileno()

    def shut_down(self) -> None:
        """End it from any thread: the socket hangs up, and whoever watches it closes."""
        self._channel.shut_down()

    def close(self) -> None:
        self._step("close")
        self._channel.close()
        if self.requests is not None:
            self.requests.close()
            self.requests = None

    def has(self, feature: Feature) -> bool:
        return feature in self.protocol_features

    def negotiate(self, wanted: int = UNDERSTOOD, patience: float = TIMEOUT) -> None:
        """Learn what the back-end can, and agree on protocol features: unknown ones count as absent.

        It gets ``patience`` seconds for that.
        """
        self._channel.allow(patience)
        self._tell(Request.SET_OWNER)
        self.features = self._number(Request.GET_FEATURES)
        if self.features & protocol.PROTOCOL_FEATURES:
            agreed = self._number(Request.GET_PROTOCOL_FEATURES) & wanted
            self._tell(Request.SET_PROTOCOL_FEATURES, agreed)
            self.protocol_features = Feature(agreed)
        if self.has(Feature.MQ):
            self.max_queues = self._number(Request.GET_QUEUE_NUM)
        if self.has(Feature.BACKEND_REQ):
            self._open_requests()
        self._step("negotiate")

    # -- configuration ----------------------------------------------------------------------------

    def config(self, size: int) -> bytes:
        """The first ``size`` bytes of the device's configuration, at most MAX_CONFIG."""
        self._channel.allow()
        reply = self._ask(Request.GET_CONFIG, 0, size, 0, tail=bytes(size))
        if len(reply.tail) != size:
            raise RemoteProtocolError(f"{self.peer}: of {size} bytes of configuration {len(reply.tail)} came")
        return reply.tail

    def set_config(self, offset: int, data: bytes) -> None:
        self._channel.allow()
        self._tell(Request.SET_CONFIG, offset, len(data), 0, tail=data)

    def shared_memory(self) -> "tuple[int, ...]":
        """Bytes of each region of memory that the back-end would show files in; none where it has none."""
        if not self.has(Feature.SHMEM):
            return ()
        self._channel.allow()
        count, *sizes = self._ask(Request.GET_SHMEM_CONFIG).values
        if count > len(sizes):
            raise RemoteProtocolError(f"{self.peer}: it has {count} regions of shared memory")
        return tuple(sizes[:count])

    # -- rings ------------------------------------------------------------------------------------

    def inflight(self, queues: int, queue_size: int) -> "Inflight | None":
        """A new inflight region for so many queues, the caller's; None where the back-end keeps none."""
        if not self.has(Feature.INFLIGHT_SHMFD):
            return None
        self._channel.allow()
        reply, fds = self._exchange(Request.GET_INFLIGHT_FD, 0, 0, queues, queue_size)
        size, offset, *_ = reply.values
        if not fds:
            return None
        if not 0 < size <= MAX_INFLIGHT or offset + size > MAX_INFLIGHT:
            close_all(fds)
            raise RemoteProtocolError(f"{self.peer}: an inflight region of {size} bytes at {offset}")
        return Inflight(fds.pop(), size, offset, queues, queue_size)

    def start(
        self,
        memory: "GuestMemory",
        features: int,
        rings: "Sequence[Ring]",
        inflight: "Inflight | None" = None,
    ) -> None:
        """Let the back-end serve ``rings``, with the ``features`` of virtio that the driver chose."""
        self._expect("start")
        self._channel.allow()
        self._features = features | self.features & protocol.PROTOCOL_FEATURES
        self._tell(Request.SET_FEATURES, self._features)
        self._share(memory)
        if inflight is not None and self.has(Feature.INFLIGHT_SHMFD):
            self._tell(Request.SET_INFLIGHT_FD, *inflight.about, fds=[inflight.fd])
        self._rings = rings
        for ring in rings:
            self._set_up(ring)
        for ring in rings:
            if self.features & protocol.PROTOCOL_FEATURES:
                self._tell(Request.SET_VRING_ENABLE, ring.index, int(ring.enabled))
        self._settle()
        self._step("start")

    def stop(self) -> "dict[int, int]":
        """Take the rings back: where each stands, by index. Nothing is in flight afterwards."""
        self._expect("stop")
        self._channel.allow()
        for ring in self._rings:
            if self.features & protocol.PROTOCOL_FEATURES:
                self._tell(Request.SET_VRING_ENABLE, ring.index, 0)
        bases = {}
        for ring in self._rings:
            reply = self._ask(Request.GET_VRING_BASE, ring.index, 0)
            if reply.values[0] != ring.index:
                raise RemoteProtocolError(
                    f"{self.peer}: the base of ring {reply.values[0]}, not {ring.index}"
                )
            bases[ring.index] = reply.values[1] & 0xFFFF
        self._rings = ()
        self._step("stop")
        return bases

    def reset_device(self) -> None:
        """Back to the state of before any driver, where the back-end knows how."""
        if self.has(Feature.RESET_DEVICE):
            self._channel.allow()
            self._tell(Request.RESET_DEVICE)

    def enable(self, index: int, enabled: bool) -> None:
        """Let a ring that was set up be served, or not."""
        self._channel.allow()
        if self.features & protocol.PROTOCOL_FEATURES:
            self._tell(Request.SET_VRING_ENABLE, index, int(enabled))

    def set_call(self, index: int, fd: int) -> None:
        """Interrupts of a ring go to another eventfd, or with -1 nowhere."""
        self._channel.allow()
        self._hand_over(Request.SET_VRING_CALL, index, fd)

    # -- what migration needs ---------------------------------------------------------------------

    def start_logging(self, fd: int, size: int, offset: int = 0) -> None:
        """Have a bit set for each 4 KiB page that the back-end writes, by gpa, in ``size`` bytes of ``fd``.

        Raises LocalProtocolError where the back-end cannot.
        """
        if not (self.features & protocol.LOG_ALL and self.has(Feature.LOG_SHMFD)):
            raise LocalProtocolError(f"{self.peer} cannot log what it writes")
        self._channel.allow()
        self._exchange(Request.SET_LOG_BASE, size, offset, fds=[fd])
        self._log(True)

    def stop_logging(self) -> None:
        self._channel.allow()
        self._log(False)

    def _log(self, on: bool) -> None:
        self._features = self._features & ~protocol.LOG_ALL | (protocol.LOG_ALL if on else 0)
        for ring in self._rings:
            self._set_addresses(ring)
        self._tell(Request.SET_FEATURES, self._features)
        self._settle()

    # -- set-up -----------------------------------------------------------------------------------

    def _share(self, memory: "GuestMemory") -> None:
        """Hand over all regions, once in a conversation."""
        if self._memory is memory:
            return
        table = [(gpa, region.size, region.hva, region.offset) for gpa, region in memory.shareable]
        fds = [region.fd for _, region in memory.shareable]
        if any(fd < 0 for fd in fds):
            raise LocalProtocolError(f"{self.peer} cannot be given guest memory that has no descriptor")
        if self.has(Feature.CONFIGURE_MEM_SLOTS):
            slots = self._number(Request.GET_MAX_MEM_SLOTS)
            if slots < len(table):
                raise RemoteProtocolError(
                    f"{self.peer}: it takes {slots} regions of memory, not {len(table)}"
                )
            for about, fd in zip(table, fds, strict=True):
                self._tell(Request.ADD_MEM_REG, *about, fds=[fd])
        elif len(table) > protocol.MAX_REGIONS:
            raise RemoteProtocolError(
                f"{self.peer}: it takes {protocol.MAX_REGIONS} regions of memory, not {len(table)}"
            )
        else:
            tail = b"".join(protocol.REGION.pack(*about) for about in table)
            self._tell(Request.SET_MEM_TABLE, len(table), tail=tail, fds=fds)
        self._memory = memory

    def _set_up(self, ring: Ring) -> None:
        queue = ring.queue
        self._tell(Request.SET_VRING_NUM, ring.index, queue.size)
        self._tell(Request.SET_VRING_BASE, ring.index, ring.base)
        self._set_addresses(ring)
        self._hand_over(Request.SET_VRING_CALL, ring.index, queue.call_fd)
        self._hand_over(Request.SET_VRING_KICK, ring.index, queue.kick_fd)

    def _set_addresses(self, ring: Ring) -> None:
        queue = ring.queue
        logged = self._features & protocol.LOG_ALL
        self._tell(
            Request.SET_VRING_ADDR,
            ring.index,
            protocol.LOG_VRING if logged else 0,
            self._hva(queue.descriptors),
            self._hva(queue.used),
            self._hva(queue.available),
            queue.used if logged else 0,
        )

    def _hva(self, gpa: int) -> int:
        """Where ``gpa`` is mapped here: the back-end finds its own place by the regions' hva."""
        assert self._memory is not None
        for base, region in self._memory.shareable:
            if base <= gpa < base + region.size:
                return int(gpa - base + region.hva)
        raise LocalProtocolError(f"a ring at {gpa:#x} is outside of guest memory")

    def _hand_over(self, request: Request, index: int, fd: int) -> None:
        if fd < 0:
            self._tell(request, index | protocol.NO_FD)
        else:
            self._tell(request, index, fds=[fd])

    def _open_requests(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.requests = Connection(ours, self.peer, protocol.BACKEND, asks=False)
        with theirs:
            self._tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    # -- talking ----------------------------------------------------------------------------------

    def _tell(self, request: Request, *values: int, tail: bytes = b"", fds: "Iterable[int]" = ()) -> None:
        """Send what has no reply, and hear that it worked where the back-end says so."""
        acknowledged = self.has(Feature.REPLY_ACK)
        flags = protocol.VERSION | (protocol.NEED_REPLY if acknowledged else 0)
        self._channel.send(Message(request, *values, tail=tail, flags=flags), fds)
        if acknowledged and self._reply(request)[0].values[0]:
            raise RemoteProtocolError(f"{self.peer}: it refuses {request.name}")

    def _settle(self) -> None:
        """Without acknowledgements: a question whose answer tells that all before it was taken."""
        if not self.has(Feature.REPLY_ACK):
            self._number(Request.GET_FEATURES)

    def _number(self, request: Request) -> int:
        return self._ask(request).values[0]

    def _ask(self, request: Request, *values: int, tail: bytes = b"") -> Message:
        return self._exchange(request, *values, tail=tail)[0]

    def _exchange(
        self, request: Request, *values: int, tail: bytes = b"", fds: "Iterable[int]" = ()
    ) -> "tuple[Message, list[int]]":
        self._channel.send(Message(request, *values, tail=tail), fds)
        return self._reply(request)

    def _reply(self, request: Request) -> "tuple[Message, list[int]]":
        reply, fds = self._channel.receive()
        if reply.request != request:
            close_all(fds)
            name = Request(reply.request).name
            raise RemoteProtocolError(f"{self.peer}: a reply to {name}, where {request.name} was asked")
        return reply, fds

    # -- state ------------------------------------------------------------------------------------

    def _expect(self, event: str) -> None:
        if event not in TRANSITIONS[self.state]:
            raise LocalProtocolError(f"{self.peer}: no {event} while {self.state}")

    def _step(self, event: str) -> None:
        self._expect(event)
        self.state = TRANSITIONS[self.state][event]

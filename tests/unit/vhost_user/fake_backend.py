"""A back-end in this process, which answers what it is told to and notes what it was asked."""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pileus.errors import PileusError
from pileus.memory import GuestMemory, Region
from pileus.vhost_user import protocol
from pileus.vhost_user.connection import Connection, close_all
from pileus.vhost_user.protocol import NO_FD, REPLY, VERSION, BackendRequest, Feature, Message, Request
from pileus.virtio.device import VERSION_1
from pileus.virtio.queue import RING_FEATURES, Queue

ALL = Feature(
    Feature.MQ | Feature.REPLY_ACK | Feature.CONFIG | Feature.BACKEND_REQ | Feature.INFLIGHT_SHMFD
    | Feature.CONFIGURE_MEM_SLOTS | Feature.LOG_SHMFD | Feature.RESET_DEVICE
)  # fmt: skip
UNKNOWN = 1 << 63  # of virtio or of the protocol: no front-end may agree to it
PATIENCE = 10.0
Answer = Callable[[Message], "Message | bytes | None"]


class Vring:
    """What the front-end said of a ring."""

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, ...] = ()
        self.kick = self.call = -1
        self.enabled = False
        self.queue: Queue | None = None


class FakeBackend:
    """Listens at ``path`` and serves one front-end after the other, on a thread.

    ``answers`` replace what it would say: a Message, or bytes as they are, or None for nothing at all.
    ``fill`` is what every ring that is kicked writes into its chains; None leaves the rings alone.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        features: int = VERSION_1 | RING_FEATURES | protocol.PROTOCOL_FEATURES | protocol.LOG_ALL,
        protocol_features: int = ALL,
        queues: int = 8,
        config: bytes = bytes(60),
        answers: dict[int, Answer] | None = None,
        fill: bytes | None = None,
        serve: bool = True,
    ) -> None:
        self.features = features
        self.protocol_features = protocol_features
        self.queues = queues
        self.config = config
        self.answers = answers or {}
        self.fill = fill
        self.asked: list[Message] = []
        self.vrings = [Vring() for _ in range(queues)]
        self.memory: GuestMemory | None = None
        self.regions: list[tuple[int, int, int, int]] = []
        self.agreed = Feature(0)
        self.virtio_features = 0
        self.inflight: int | None = None  # the inode that SET_INFLIGHT_FD brought
        self.logged: int | None = None
        self.requests: Connection | None = None
        self.started = threading.Condition()
        self._fds: list[int] = []
        self._connection: Connection | None = None
        self._stopped = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.path = str(path)
        self._thread = threading.Thread(target=self._run, daemon=True)
        if serve:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Die: no front-end gets an answer any more, and nobody listens."""
        if self._stopped:
            return
        self._stopped = True
        os.unlink(self.path)
        self._listener.shutdown(socket.SHUT_RDWR)
        if self._connection is not None:
            self._connection.shut_down()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()
        self._listener.close()

    def drop(self) -> None:
        """End the present conversation; the next one may come."""
        assert self._connection is not None
        self._connection.shut_down()

    def names(self) -> list[str]:
        return [Request(message.request).name for message in self.asked]

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self.started:
            assert self.started.wait_for(condition, PATIENCE)

    def ask(self, request: BackendRequest, *values: int, flags: int = VERSION) -> None:
        """As the back-end's own request."""
        assert self.requests is not None
        self.requests.allow(PATIENCE)
        self.requests.send(Message(request, *values, flags=flags))

    # -- serving ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._connection = Connection(sock, "the front-end", protocol.FRONTEND, asks=False)
            try:
                while True:
                    self._connection.allow(PATIENCE)
                    self._serve(*self._connection.receive())
            except PileusError:
                pass
            finally:
                self._forget()

    def _forget(self) -> None:
        assert self._connection is not None
        self._connection.close()
        if self.requests is not None:
            self.requests.close()
            self.requests = None
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        for vring in self.vrings:
            if vring.queue is not None:
                vring.queue.close()
        self.vrings = [Vring() for _ in range(self.queues)]
        self.regions = []
        close_all(self._fds)

    def _serve(self, message: Message, fds: list[int]) -> None:
        assert self._connection is not None
        self._fds += fds
        handler = self.answers.get(message.request)
        reply_fds: list[int] = []
        if handler is not None:
            reply = handler(message)
        else:
            reply, reply_fds = self._reply(message, fds)
            if reply is None and message.needs_reply:
                reply = Message(message.request, 0)
        with self.started:
            self.asked.append(message)
            self.started.notify_all()
        if isinstance(reply, bytes):
            self._connection._socket.sendall(reply)
        elif reply is not None:
            reply.flags = VERSION | REPLY
            self._connection.send(reply, reply_fds)
        close_all(reply_fds)

    def _reply(self, message: Message, fds: list[int]) -> tuple[Message | None, list[int]]:  # noqa: PLR0911, PLR0912
        request, values = message.request, message.values
        match request:
            case Request.GET_FEATURES:
                return Message(request, self.features), []
            case Request.SET_FEATURES:
                self.virtio_features = values[0]
            case Request.GET_PROTOCOL_FEATURES:
                return Message(request, self.protocol_features), []
            case Request.SET_PROTOCOL_FEATURES:
                self.agreed = Feature(values[0])
            case Request.GET_QUEUE_NUM:
                return Message(request, self.queues), []
            case Request.GET_MAX_MEM_SLOTS:
                return Message(request, 32), []
            case Request.GET_CONFIG:
                return Message(request, *values, tail=self.config[: values[1]]), []
            case Request.SET_CONFIG:
                offset, size, _ = values
                self.config = self.config[:offset] + message.tail + self.config[offset + size :]
            case Request.SET_BACKEND_REQ_FD:
                sock = socket.socket(fileno=os.dup(fds[0]))
                self.requests = Connection(sock, "the front-end", protocol.BACKEND, asks=True)
            case Request.GET_INFLIGHT_FD:
                fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
                os.ftruncate(fd, 8192)
                return Message(request, 8192, 0, *values[2:]), [fd]
            case Request.SET_INFLIGHT_FD:
                self.inflight = os.fstat(fds[0]).st_ino
            case Request.SET_LOG_BASE:
                self.logged = os.fstat(fds[0]).st_ino
                return Message(request, 0), []
            case Request.SET_MEM_TABLE:
                self._add_regions(message.regions, fds)
            case Request.ADD_MEM_REG:
                self._add_regions([values[:4]], fds)
            case Request.GET_VRING_BASE:
                queue = self.vrings[values[0]].queue
                base = self.vrings[values[0]].base if queue is None else queue.state()["next_avail"]
                return Message(request, values[0], int(base)), []
            case _:
                self._set_vring(message, fds)
        return None, []

    def _add_regions(self, regions: Sequence[tuple[int, ...]], fds: list[int]) -> None:
        for (gpa, size, hva, offset), fd in zip(regions, fds, strict=True):
            self.regions.append((gpa, size, hva, offset))
            known = [] if self.memory is None else self.memory.regions
            region = Region(os.dup(fd), size, offset)
            self.memory = GuestMemory([*known, (gpa, region)])

    def _set_vring(self, message: Message, fds: list[int]) -> None:
        values = message.values
        if message.request not in VRING_REQUESTS:
            return
        vring = self.vrings[values[0] & ~NO_FD]
        match message.request:
            case Request.SET_VRING_NUM:
                vring.size = values[1]
            case Request.SET_VRING_BASE:
                vring.base = values[1]
            case Request.SET_VRING_ADDR:
                vring.addresses = values[2:5]
            case Request.SET_VRING_CALL:
                vring.call = fds[0] if fds else -1
                if vring.queue is not None:
                    vring.queue.call_fd = vring.call
            case Request.SET_VRING_KICK:
                vring.kick = fds[0] if fds else -1
            case Request.SET_VRING_ENABLE:
                vring.enabled = bool(values[1])
                if vring.enabled and self.fill is not None:
                    self._fill(vring)

    def _fill(self, vring: Vring) -> None:
        """Fill the chains that are there now; with a thread of its own it would be a back-end."""
        assert self.memory is not None
        assert self.fill is not None
        if vring.queue is None:
            queue = vring.queue = Queue(32768)
            queue.restore(
                {
                    "size": vring.size,
                    "enabled": True,
                    "descriptors": self._gpa(vring.addresses[0]),
                    "used": self._gpa(vring.addresses[1]),
                    "available": self._gpa(vring.addresses[2]),
                    "next_avail": vring.base,
                    "next_used": vring.base,
                }
            )
            queue.activate(self.memory, self.virtio_features)
            queue.call_fd = vring.call
        for chain in vring.queue:
            vring.queue.push_used(chain, chain.write(self.fill * chain.writable_len))
        vring.queue.notify()

    def _gpa(self, hva: int) -> int:
        for gpa, size, base, _ in self.regions:
            if base <= hva < base + size:
                return gpa + hva - base
        raise AssertionError(f"{hva:#x} is in no region")


VRING_REQUESTS = {
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_CALL,
    Request.SET_VRING_KICK,
    Request.SET_VRING_ENABLE,
}

"""The back-end's half of one conversation: a front-end drives a virtio device that lives in this process.

The device and its queues are those that a VM has within its own process; they know nothing of this. What a
transport does for them there is done here by messages: features, rings, interrupts, configuration.

A ring is *live* once it has size, addresses and a kick, and is enabled. Whatever changes about a live one is
done while the device is paused, with nothing under way. The device is activated with its first live ring, and
reset when features change, when the front-end says so, or when it is gone.

Source: vhost-user specification, Communication; Starting and stopping rings; Inflight I/O tracking
"""

import errno
import os
import socket

from pileus import log
from pileus.errors import GuestError, HostError, PileusError, RemoteProtocolError
from pileus.memory import Region
from pileus.vhost_user import protocol
from pileus.vhost_user.connection import Connection, close_all
from pileus.vhost_user.memory_table import SLOTS, MemoryTable
from pileus.vhost_user.protocol import (
    REPLY,
    VERSION,
    VRING_MASK,
    BackendRequest,
    Feature,
    Message,
    Request,
)
from pileus.vhost_user.vring import Vring
from pileus.virtio import status
from pileus.virtio.device import VERSION_1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.loop import Loop
    from pileus.virtio.device import VirtioDevice

    Handler = Callable[["Backend", Message, list[int]], "Message | None"]

READABLE = 1  # EPOLLIN
FEATURES = (
    Feature.MQ
    | Feature.LOG_SHMFD
    | Feature.REPLY_ACK
    | Feature.BACKEND_REQ
    | Feature.CONFIG
    | Feature.INFLIGHT_SHMFD
    | Feature.RESET_DEVICE
    | Feature.CONFIGURE_MEM_SLOTS
    | Feature.STATUS
)
OURS = protocol.PROTOCOL_FEATURES | protocol.LOG_ALL  # feature bits that no device sees
REFUSED = 1
NOTES_SIZE, NOTES_ALIGN = 16, 64  # bytes for a queue, and for each of its descriptors
MAX_INFLIGHT = 64 << 20
HAND_OFF = 1.0  # seconds that a front-end has to take what it did not ask for


class Backend:
    """Serves whoever is at the other end of ``sock``, which it owns; ``ended`` is called when that is over.

    All on the thread of ``loop``. ``device`` stays the caller's, and is reset in the end.
    """

    def __init__(
        self,
        device: "VirtioDevice",
        sock: "socket.socket",
        loop: "Loop",
        ended: "Callable[[], None]",
        peer: str = "the front-end",
    ) -> None:
        self.device = device
        self.features = 0  # of virtio, with OURS, as the front-end set them
        self.protocol_features = Feature(0)
        self._loop = loop
        self._ended = ended
        self._channel = Connection(sock, peer, protocol.FRONTEND, asks=False)
        self._table = MemoryTable()
        self._vrings = [Vring(index, queue) for index, queue in enumerate(device.queues)]
        self._requests: Connection | None = None
        self._inflight: tuple[Region, int, int] | None = None  # the bytes of a queue, and how many queues
        self._log: Region | None = None
        self._status = 0
        self._active = False  # device.activate was called
        self._closed = False
        device.broke = lambda: loop.post(self._broke)
        device.changed = self._config_changed
        loop.watch(self._channel.fileno(), READABLE, self._readable)

    def close(self) -> None:
        """End the conversation; closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._loop.unwatch(self._channel.fileno())
        self._channel.close()
        for vring in self._vrings:
            if vring.live:
                vring.unblock()
        self._reset_device()
        for vring in self._vrings:
            vring.close()
        if self._requests is not None:
            self._requests.close()
        self._table.clear()
        self._inflight = self._log = None
        self.device.broke = self.device.changed = _nothing
        self.device.mapper = None
        self._ended()

    @property
    def offered(self) -> int:
        """The feature bits to choose from."""
        return self.device.offered | OURS

    @property
    def protocol_offered(self) -> Feature:
        """Who gives chains back in the order of their offer has nothing to note of those under way."""
        features = FEATURES & ~Feature.INFLIGHT_SHMFD if self.device.in_order else FEATURES
        return features | (Feature.SHMEM if self.device.shared_memory else Feature(0))

    # -- messages ---------------------------------------------------------------------------------

    def _readable(self, _events: int) -> None:
        try:
            received = self._channel.receive_now()
            if received is None:
                return
            message, fds = received
            try:
                self._obey(message, fds)
            finally:
                close_all(fds)
        except HostError as error:
            log.info(f"{self.device.name}: {error}")
            self.close()
        except PileusError as error:
            log.limited(log.WARNING, f"{self.device.name}: {error}; the conversation is over")
            self.close()

    def _obey(self, message: Message, fds: "list[int]") -> None:
        """Do what was asked, and answer. Refusing without an answer ends the conversation: it raises."""
        request = Request(message.request)
        answered = message.needs_reply and Feature.REPLY_ACK in self.protocol_features
        try:
            handler = HANDLERS.get(request)
            if handler is None:
                raise RemoteProtocolError(f"{request.name} is not for us")
            reply = handler(self, message, fds)
            if reply is None and answered:
                reply = Message(request, 0)
        except PileusError as error:
            if not answered or protocol.FRONTEND[request].reply is not None:
                raise
            log.limited(log.WARNING, f"{self.device.name}: refuses {request.name}: {error}")
            reply = Message(request, REFUSED)
        if reply is not None:
            self._reply(reply, fds if request == Request.GET_INFLIGHT_FD else [])

    def _reply(self, reply: Message, fds: "list[int]") -> None:
        reply.flags = VERSION | REPLY
        self._channel.allow()
        self._channel.send(reply, fds)

    # -- who we are -------------------------------------------------------------------------------

    def _nothing_to_do(self, _message: Message, _fds: "list[int]") -> None:
        pass

    def _get_features(self, message: Message, _fds: "list[int]") -> Message:
        return Message(message.request, self.offered)

    def _set_features(self, message: Message, _fds: "list[int]") -> None:
        (features,) = message.values
        if unknown := features & ~self.offered:
            raise RemoteProtocolError(f"features {unknown:#x} were not offered")
        if (features ^ self.features) & ~protocol.LOG_ALL:
            if self._any_live():
                raise RemoteProtocolError("features change while rings are served")
            self._reset_device()
        self.features = features
        self._update_log()

    def _get_protocol_features(self, message: Message, _fds: "list[int]") -> Message:
        return Message(message.request, self.protocol_offered)

    def _set_protocol_features(self, message: Message, _fds: "list[int]") -> None:
        if unknown := message.values[0] & ~int(self.protocol_offered):
            raise RemoteProtocolError(f"protocol features {unknown:#x} were not offered")
        self.protocol_features = Feature(message.values[0])
        self._offer_mapper()

    def _get_queue_num(self, message: Message, _fds: "list[int]") -> Message:
        return Message(message.request, self.device.queue_groups)

    def _get_status(self, message: Message, _fds: "list[int]") -> Message:
        return Message(message.request, self._status | (status.NEEDS_RESET if self.device.failed else 0))

    def _set_status(self, message: Message, _fds: "list[int]") -> None:
        self._status = message.values[0] & 0xFF
        if not self._status:
            self._reset_device()

    def _reset(self, _message: Message, _fds: "list[int]") -> None:
        self._reset_device()
        for vring in self._vrings:
            vring.enabled = False

    def _get_shared_memory(self, message: Message, _fds: "list[int]") -> Message:
        sizes = self.device.shared_memory
        return Message(message.request, len(sizes), *sizes, *(0,) * (protocol.MAX_SHMEM - len(sizes)))

    def _set_requests(self, _message: Message, fds: "list[int]") -> None:
        try:
            sock = socket.socket(fileno=fds[0])
        except OSError as error:
            raise RemoteProtocolError("the channel for our requests is no socket") from error
        fds.clear()
        if self._requests is not None:
            self._requests.close()
        self._requests = Connection(sock, "the front-end", protocol.BACKEND, asks=True)
        self._offer_mapper()

    def _offer_mapper(self) -> None:
        """The device may map files for the driver where the front-end does that, and says how it went."""
        able = Feature.SHMEM | Feature.REPLY_ACK
        if self._requests is None or self.protocol_features & able != able:
            self.device.mapper = None
        else:
            self.device.mapper = Mapper(self._requests)

    # -- configuration ----------------------------------------------------------------------------

    def _get_config(self, message: Message, _fds: "list[int]") -> Message:
        offset, size, flags = message.values
        if offset + size > protocol.MAX_CONFIG:
            return Message(message.request, offset, 0, flags)
        with self.device.lock:
            config = self.device.read_config(offset, size)
        return Message(message.request, offset, size, flags, tail=config)

    def _set_config(self, message: Message, _fds: "list[int]") -> None:
        offset, size, _ = message.values
        if offset + size > protocol.MAX_CONFIG:
            raise RemoteProtocolError(f"{size} bytes of configuration at {offset}")
        with self.device.lock:
            self.device.write_config(offset, message.tail)

    def _config_changed(self) -> None:
        self._loop.post(self._tell_config)

    def _tell_config(self) -> None:
        requests = self._requests
        if self._closed or requests is None or Feature.CONFIG not in self.protocol_features:
            return
        try:
            requests.allow(HAND_OFF)
            requests.send(Message(BackendRequest.CONFIG_CHANGE_MSG))
        except HostError as error:
            log.limited(log.WARNING, f"{self.device.name}: {error}")
            requests.close()
            self._requests = None

    # -- memory -----------------------------------------------------------------------------------

    def _get_slots(self, message: Message, _fds: "list[int]") -> Message:
        return Message(message.request, SLOTS)

    def _set_memory(self, message: Message, fds: "list[int]") -> None:
        regions = list(zip(message.regions, fds, strict=True))
        self._change_memory(lambda: self._table.replace(regions))

    def _add_memory(self, message: Message, fds: "list[int]") -> None:
        about = message.values
        self._change_memory(lambda: self._table.add((about[0], about[1], about[2], about[3]), fds[0]))

    def _remove_memory(self, message: Message, _fds: "list[int]") -> None:
        about = message.values
        self._change_memory(lambda: self._table.remove((about[0], about[1], about[2], about[3])))

    def _change_memory(self, change: "Callable[[], None]") -> None:
        """Rings that are live go on in the new memory, if they are still there."""
        with self._paused():
            change()
            for vring in self._live():
                try:
                    self._place(vring)
                except PileusError as error:
                    self._take_down(vring)
                    log.limited(log.WARNING, f"{self.device.name}: ring {vring.index}: {error}")
            if self._active:
                self.device.memory = self._table.memory
            self._update_log(paused=True)
        self._wake()

    def _set_log(self, message: Message, fds: "list[int]") -> Message:
        size, offset = message.values
        region = Region(fds[0], size, offset, guarded=True)
        fds.clear()
        with self._paused():
            self._log = region
            self._update_log(paused=True)
        return Message(message.request, 0)

    def _update_log(self, paused: bool = False) -> None:
        memory = self._table.memory
        if memory is None:
            return
        region = self._log if self.features & protocol.LOG_ALL else None
        if paused:
            memory.log_to(region)
        else:
            with self._paused():
                memory.log_to(region)

    def _get_inflight(self, message: Message, fds: "list[int]") -> Message:
        _, _, queues, queue_size = message.values
        size = _notes_size(queue_size) * queues
        if not 0 < queues <= len(self._vrings) or not 0 < size <= MAX_INFLIGHT:
            raise RemoteProtocolError(f"an inflight region for {queues} queues of {queue_size}")
        fds.append(os.memfd_create("pileus-inflight", os.MFD_CLOEXEC))
        os.ftruncate(fds[0], size)
        return Message(message.request, size, 0, queues, queue_size)

    def _set_inflight(self, message: Message, fds: "list[int]") -> None:
        size, offset, queues, queue_size = message.values
        each = _notes_size(queue_size)
        if not 0 < each * queues <= size <= MAX_INFLIGHT:
            raise RemoteProtocolError(
                f"an inflight region of {size} bytes for {queues} queues of {queue_size}"
            )
        if os.fstat(fds[0]).st_size < offset + size:
            raise RemoteProtocolError(
                f"an inflight region of {size} bytes at {offset} is outside of its file"
            )
        region = Region(fds[0], size, offset, guarded=True)
        fds.clear()
        self._inflight = region, each, queues

    # -- rings ------------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise RemoteProtocolError(f"there is no ring {index}")
        return self._vrings[index]

    def _set_num(self, message: Message, _fds: "list[int]") -> None:
        vring, size = self._resting(message.values[0]), message.values[1]
        if not size or size & (size - 1) or size > vring.queue.max_size:
            raise RemoteProtocolError(f"a ring of {size}, where {vring.queue.max_size} is the most")
        vring.size = size

    def _set_base(self, message: Message, _fds: "list[int]") -> None:
        self._resting(message.values[0]).base = message.values[1] & 0xFFFF

    def _resting(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.live:
            raise RemoteProtocolError(f"ring {index} is served: it has to be stopped first")
        return vring

    def _set_addresses(self, message: Message, _fds: "list[int]") -> None:
        """Of a live ring they come again when its flag for the log changes; the log covers all rings here."""
        index, _flags, *addresses, _log = message.values
        vring = self._vring(index)
        if vring.addresses == tuple(addresses):
            return
        if vring.live:
            raise RemoteProtocolError(f"ring {index} is served: it cannot move")
        vring.addresses = tuple(addresses)
        self._update(vring)

    def _set_kick(self, message: Message, fds: "list[int]") -> None:
        vring = self._vring(message.values[0] & VRING_MASK)
        if not fds:
            raise RemoteProtocolError(f"ring {vring.index} has no kick, and would have to be polled")
        if vring.live:
            with self._paused():
                self._unwatch(vring)
                vring.set_kick(fds[0])
                self._watch(vring)
            self._wake()
            return
        vring.set_kick(fds[0])
        self._update(vring)

    def _set_call(self, message: Message, fds: "list[int]") -> None:
        self._vring(message.values[0] & VRING_MASK).set_call(fds[0] if fds else -1)

    def _set_err(self, message: Message, fds: "list[int]") -> None:
        self._vring(message.values[0] & VRING_MASK).set_err(fds[0] if fds else -1)

    def _set_enable(self, message: Message, _fds: "list[int]") -> None:
        vring = self._vring(message.values[0])
        vring.enabled = bool(message.values[1])
        self._update(vring)

    def _get_base(self, message: Message, _fds: "list[int]") -> Message:
        """Stop the ring: where it stands when all that was under way has ended."""
        vring = self._vring(message.values[0])
        if vring.live:
            with self._paused():
                self._take_down(vring)
        vring.stop()
        if self.device.failed and not self._any_live():
            self._reset_device()  # as its driver will have done
        return Message(message.request, vring.index, vring.base)

    def _update(self, vring: Vring) -> None:
        """Let ``vring`` be served if it may, or not if it may not."""
        enabled = vring.enabled or not self.features & protocol.PROTOCOL_FEATURES
        ready = (
            vring.started and enabled and vring.size and vring.addresses and self._table.memory is not None
        )
        if bool(ready) == vring.live:
            return
        if not ready:
            with self._paused():
                self._take_down(vring)
            return
        if not self.features & VERSION_1:
            raise RemoteProtocolError("a front-end without VIRTIO_F_VERSION_1 is not served")
        with self._paused():
            self._bring_up(vring)
        self._wake(vring)

    def _bring_up(self, vring: Vring) -> None:
        queue = vring.queue
        memory = self._table.memory
        assert memory is not None
        queue.reset()
        try:
            self._place(vring)
            if self._inflight is not None and vring.index < self._inflight[2]:
                region, each, _ = self._inflight
                queue.keep_notes(region, vring.index * each)
        except PileusError:
            queue.reset()
            raise
        queue.call_fd = vring.call
        vring.live = True
        self._watch(vring)
        if not self._active:
            self.device.driver_features = self.features & ~OURS
            self._update_log(paused=True)
        self.device.memory = memory

    def _place(self, vring: Vring) -> None:
        """Tell the queue where it is in the present memory. Raises PileusError where it is not."""
        queue, memory = vring.queue, self._table.memory
        if memory is None or vring.addresses is None:
            raise RemoteProtocolError("there is no memory")
        descriptors, used, available = map(self._table.gpa, vring.addresses)
        if vring.live:
            stands = queue.state()
            base, next_used = stands["next_avail"], stands["next_used"]
        else:
            base = vring.base
            try:
                next_used = int.from_bytes(memory.read(used + 2, 2), "little")
            except ValueError as error:
                raise GuestError(str(error)) from error
        queue.restore(
            {
                "size": vring.size, "enabled": True,
                "descriptors": descriptors, "available": available, "used": used,
                "next_avail": base, "next_used": next_used,
            }
        )  # fmt: skip
        queue.activate(memory, self.features)

    def _take_down(self, vring: Vring) -> None:
        """The device is paused. Chains that are under way nevertheless are to be offered again."""
        vring.base = vring.queue.state()["next_used"]
        self._unwatch(vring)
        vring.live = False
        vring.queue.call_fd = -1
        vring.queue.reset()

    def _live(self) -> "list[Vring]":
        return [vring for vring in self._vrings if vring.live]

    def _any_live(self) -> bool:
        return any(vring.live for vring in self._vrings)

    def _watch(self, vring: Vring) -> None:
        if vring.index in self.device.python_queues:
            self._loop.watch(vring.queue.kick_fd, READABLE, lambda _: self._kicked(vring))

    def _unwatch(self, vring: Vring) -> None:
        if vring.index in self.device.python_queues:
            self._loop.unwatch(vring.queue.kick_fd)

    def _kicked(self, vring: Vring) -> None:
        try:
            os.eventfd_read(vring.queue.kick_fd)
        except BlockingIOError:
            return
        self.device.kicked(vring.index)

    def _wake(self, *vrings: Vring) -> None:
        """Look at rings that were offered chains, and perhaps kicked, before anybody listened."""
        for vring in vrings or self._live():
            if vring.live and vring.index in self.device.python_queues:
                self.device.kicked(vring.index)

    # -- the device -------------------------------------------------------------------------------

    def _paused(self) -> "Pause":
        return Pause(self)

    def _broke(self) -> None:
        """The driver broke a rule: nothing is served until a reset, or until all rings were stopped."""
        if not self._closed:
            for vring in self._live():
                vring.tell_error()

    def _reset_device(self) -> None:
        device = self.device
        with device.lock:
            if self._active:
                device.reset()
            self._active = False
            device.memory = None
            for vring in self._live():
                self._take_down(vring)
            device.driver_features = 0
            device.failed = False
            device.resume()


class Pause:
    """Keeps the device from its queues and from memory; in the end it goes on, if a ring is live."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        if self._backend._active:
            self._backend.device.pause()

    def __exit__(self, *_: object) -> None:
        backend = self._backend
        if not backend._any_live():
            return
        try:
            if backend._active:
                backend.device.resume()
            else:
                backend._active = True
                backend.device.activate()
        except PileusError as error:
            backend.device.fail(str(error))


HANDLERS: "dict[int, Handler]" = {
    Request.GET_FEATURES: Backend._get_features,
    Request.SET_FEATURES: Backend._set_features,
    Request.SET_OWNER: Backend._nothing_to_do,
    Request.RESET_OWNER: Backend._nothing_to_do,  # deprecated, and never well defined
    Request.GET_PROTOCOL_FEATURES: Backend._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    Request.GET_QUEUE_NUM: Backend._get_queue_num,
    Request.GET_STATUS: Backend._get_status,
    Request.SET_STATUS: Backend._set_status,
    Request.GET_SHMEM_CONFIG: Backend._get_shared_memory,
    Request.RESET_DEVICE: Backend._reset,
    Request.SET_BACKEND_REQ_FD: Backend._set_requests,
    Request.GET_CONFIG: Backend._get_config,
    Request.SET_CONFIG: Backend._set_config,
    Request.GET_MAX_MEM_SLOTS: Backend._get_slots,
    Request.SET_MEM_TABLE: Backend._set_memory,
    Request.ADD_MEM_REG: Backend._add_memory,
    Request.REM_MEM_REG: Backend._remove_memory,
    Request.SET_LOG_BASE: Backend._set_log,
    Request.SET_LOG_FD: Backend._nothing_to_do,  # of the log that SHMFD replaced
    Request.GET_INFLIGHT_FD: Backend._get_inflight,
    Request.SET_INFLIGHT_FD: Backend._set_inflight,
    Request.SET_VRING_NUM: Backend._set_num,
    Request.SET_VRING_ADDR: Backend._set_addresses,
    Request.SET_VRING_BASE: Backend._set_base,
    Request.GET_VRING_BASE: Backend._get_base,
    Request.SET_VRING_KICK: Backend._set_kick,
    Request.SET_VRING_CALL: Backend._set_call,
    Request.SET_VRING_ERR: Backend._set_err,
    Request.SET_VRING_ENABLE: Backend._set_enable,
}


class Mapper:
    """Has the front-end map files into the shared memory of the device, by its channel for our requests."""

    def __init__(self, requests: Connection) -> None:
        self._requests = requests

    def map(self, region: int, fd: int, at: int, offset: int, length: int, writable: bool) -> None:
        """Bytes of ``fd`` from ``at`` on appear at ``offset`` of ``region``. Raises OSError."""
        flags = protocol.MAP_WRITABLE if writable else 0
        self._ask(Message(BackendRequest.SHMEM_MAP, region, at, offset, length, flags), [fd])

    def unmap(self, region: int, offset: int, length: int) -> None:
        """What is there goes away. Raises OSError."""
        self._ask(Message(BackendRequest.SHMEM_UNMAP, region, 0, offset, length, 0), [])

    def _ask(self, message: Message, fds: "list[int]") -> None:
        message.flags = VERSION | protocol.NEED_REPLY
        try:
            self._requests.allow()
            self._requests.send(message, fds)
            reply, extra = self._requests.receive()
        except PileusError as error:
            log.limited(log.WARNING, f"{BackendRequest(message.request).name}: {error}")
            raise OSError(errno.EIO, "the front-end is silent") from error
        close_all(extra)
        if reply.request != message.request or reply.values[0]:
            raise OSError(errno.EINVAL, "the front-end refuses")


def _notes_size(queue_size: int) -> int:
    """Bytes for the notes on one queue."""
    return -(-(NOTES_SIZE + NOTES_SIZE * queue_size) // NOTES_ALIGN) * NOTES_ALIGN


def _nothing() -> None:
    pass

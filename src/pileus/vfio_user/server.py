"""Serves a device to one client after the other, over a Unix socket."""

import errno
import json
import os
import socket

from pileus import log
from pileus.errors import HostError, PileusError, RemoteProtocolError
from pileus.listener import Listener
from pileus.vfio import abi
from pileus.vfio_user.connection import Connection, close_all
from pileus.vfio_user.dma import DmaError, Refused
from pileus.vfio_user.protocol import (
    ERROR,
    IO_FDS,
    MAJOR,
    MAX_DMA_MAPS,
    MAX_FDS,
    MAX_TRANSFER,
    MINOR,
    PAGE_SIZE,
    REPLY,
    REQUESTS,
    Command,
    Message,
    capabilities,
    number,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pileus.vfio_user.device import PciDevice

    Reply = tuple[tuple[int, ...], bytes]  # values and tail

MAX_WAITING = 1024  # requests of a client while it owes us an answer
NOTHING: "Reply" = ((), b"")


def serve(path: str, device: "PciDevice") -> None:
    """Listen at ``path`` and serve for ever. Raises HostError where that cannot be."""
    server = Server(path)
    try:
        while True:
            server.serve_one(device)
    finally:
        server.close()


class Server:
    """Listens at ``path``. Raises HostError."""

    def __init__(self, path: str) -> None:
        try:
            self._listener = Listener(path)
        except OSError as error:
            raise HostError("listen on", path, error) from error
        self._listener.socket.setblocking(True)

    def serve_one(self, device: "PciDevice") -> None:
        """Serve the next client to its end; what it may do wrong ends its session only."""
        sock, _ = self._listener.socket.accept()
        serve_client(sock, device)

    def close(self) -> None:
        self._listener.close()


def serve_client(sock: "socket.socket", device: "PciDevice") -> None:
    """Serve whoever is at the other end of ``sock``, which is closed in the end."""
    session = Session(sock, device)
    try:
        session.run()
    except RemoteProtocolError as error:
        log.limited(log.WARNING, str(error))
    except HostError as error:
        log.debug(str(error))
    finally:
        session.close()


class Session:
    """A conversation with a client about ``device``."""

    def __init__(self, sock: "socket.socket", device: "PciDevice") -> None:
        self.device = device
        self._main = Connection(sock, "the client")
        self._twin: Connection | None = None  # for what we ask, where the client wants it apart
        self._waiting: list[tuple[Message, list[int]]] = []  # that came while we asked
        self._number = 0
        self._max_transfer = MAX_TRANSFER
        self._greeted = False
        device.dma.messages = self

    def run(self) -> None:
        """Until the client goes, which is a HostError, or breaks the protocol."""
        while True:
            message, fds = self._waiting.pop(0) if self._waiting else self._main.receive()
            try:
                self._answer(message, fds)
            finally:
                close_all(fds)

    def close(self) -> None:
        self.device.forget_client()
        for _, fds in self._waiting:
            close_all(fds)
        self._main.close()
        if self._twin is not None:
            self._twin.close()

    # -- what we ask ------------------------------------------------------------------------------

    def read_memory(self, iova: int, size: int) -> bytes:
        """On the serving thread. Raises DmaError where the client refuses."""
        parts = []
        for at in range(0, size, self._max_transfer):
            count = min(self._max_transfer, size - at)
            reply = self._ask(Message(Command.DMA_READ, iova + at, count))
            if len(reply.tail) != count:
                raise RemoteProtocolError(f"the client sent {len(reply.tail)} bytes for {count}")
            parts.append(reply.tail)
        return b"".join(parts)

    def write_memory(self, iova: int, data: bytes) -> None:
        """Likewise."""
        for at in range(0, len(data), self._max_transfer):
            part = data[at : at + self._max_transfer]
            self._ask(Message(Command.DMA_WRITE, iova + at, len(part), tail=part))

    def _ask(self, request: Message) -> Message:
        channel = self._twin or self._main
        self._number = self._number + 1 & 0xFFFF
        request.number = self._number
        channel.send(request)
        while True:
            message, fds = channel.receive()
            if not message.is_reply and channel is self._main:
                if len(self._waiting) >= MAX_WAITING:
                    close_all(fds)
                    raise RemoteProtocolError("the client asks and asks, and does not answer")
                self._waiting.append((message, fds))
                continue
            close_all(fds)
            if not message.is_reply or (message.number, message.command) != (self._number, request.command):
                raise RemoteProtocolError(f"the client answers {message.number}, which nobody asked")
            if message.failed:
                raise DmaError(f"the client refuses: {os.strerror(message.error)}")
            return message

    # -- what the client asks ---------------------------------------------------------------------

    def _answer(self, message: Message, fds: list[int]) -> None:
        if message.is_reply:
            raise RemoteProtocolError(f"the client answers {message.number}, which nobody asked")
        if self._greeted == (message.command == Command.VERSION):
            raise RemoteProtocolError(
                "the client begins twice" if self._greeted else "the client does not begin"
            )
        given: list[int] = []
        try:
            values, tail = self._do(message, fds, given)
            reply = Message(message.command, *values, tail=tail, number=message.number, flags=REPLY)
        except Refused as refused:
            close_all(given)
            reply = Message(message.command, number=message.number, flags=REPLY | ERROR, error=refused.errno)
        try:
            close_all(fds)  # before the client hears that it was refused
            if message.wants_reply:
                self._main.send(reply, given)
        finally:
            close_all(given)

    def _do(self, message: Message, fds: list[int], given: list[int]) -> "Reply":
        """Answer with values, tail, and the descriptors ``given``. Raises Refused."""
        handler = HANDLERS.get(message.command)
        if handler is None:
            raise Refused(errno.ENOTSUP)
        try:
            return handler(self, message, fds, given)
        except DmaError as error:
            log.limited(log.WARNING, f"the driver gave the device a wrong address: {error}")
            raise Refused(errno.EFAULT) from error
        except (Refused, PileusError):
            raise
        except OSError as error:
            raise Refused(error.errno or errno.EIO) from error

    def _version(self, message: Message, _fds: list[int], given: list[int]) -> "Reply":
        major, minor = message.values
        if major != MAJOR:
            raise RemoteProtocolError(f"the client speaks version {major}.{minor}")
        asked = capabilities(message.tail)
        self._max_transfer = min(MAX_TRANSFER, number(asked, "max_data_xfer_size", MAX_TRANSFER, 1))
        offered: dict[str, Any] = {
            "max_msg_fds": MAX_FDS,
            "max_data_xfer_size": MAX_TRANSFER,
            "max_dma_maps": MAX_DMA_MAPS,
            "pgsizes": PAGE_SIZE,
        }
        twin = asked.get("twin_socket")
        if isinstance(twin, dict) and twin.get("supported") is True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            given.append(theirs.detach())
            self._twin = Connection(ours, "the client")
            offered["twin_socket"] = {"supported": True, "fd_index": 0}
        self._greeted = True
        return (MAJOR, min(minor, MINOR)), json.dumps({"capabilities": offered}).encode() + b"\0"

    def _dma_map(self, message: Message, fds: list[int], _given: list[int]) -> "Reply":
        _, flags, offset, iova, size = message.values
        self.device.dma.map(iova, size, flags, fds[0] if fds else None, offset)
        return NOTHING

    def _dma_unmap(self, message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        _, flags, iova, size = message.values
        if flags:
            raise Refused(errno.EINVAL)
        self.device.dma.unmap(iova, size)
        return (), REQUESTS[Command.DMA_UNMAP].head.pack(*message.values)

    def _info(self, _message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        return (abi.DEVICE_INFO.size, abi.DEVICE_RESET | abi.DEVICE_PCI, abi.REGIONS, abi.IRQS), b""

    def _region_info(self, message: Message, _fds: list[int], given: list[int]) -> "Reply":
        index = message.values[2]
        region = self.device.region(index)
        if index in self.device.shared:
            given.append(os.dup(self.device.shared[index].fd))
        return abi.REGION_INFO.unpack(abi.encode_region(region)), b""

    def _io_fds(self, message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        index = message.values[2]
        self.device.region(index)
        return (IO_FDS.size, 0, index, 0), b""  # no doorbells: writes come as messages

    def _irq_info(self, message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        kind, irqs = message.values[2], self.device.irqs
        if kind not in irqs.counts:
            raise Refused(errno.EINVAL)
        return (abi.IRQ_INFO.size, irqs.flags(kind), kind, irqs.counts[kind]), b""

    def _set_irqs(self, message: Message, fds: list[int], _given: list[int]) -> "Reply":
        _, flags, kind, start, count = message.values
        self.device.irqs.set(kind, flags, start, count, message.tail, fds)
        return NOTHING

    def _region_read(self, message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        offset, index, count = message.values
        if count > MAX_TRANSFER:
            raise Refused(errno.EINVAL)
        return message.values, self.device.read_region(index, offset, count)

    def _region_write(self, message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        offset, index, _ = message.values
        self.device.write_region(index, offset, message.tail)
        return message.values, b""

    def _reset(self, _message: Message, _fds: list[int], _given: list[int]) -> "Reply":
        self.device.reset_all()
        return NOTHING


HANDLERS: "dict[int, Callable[[Session, Message, list[int], list[int]], Reply]]" = {
    Command.VERSION: Session._version,
    Command.DMA_MAP: Session._dma_map,
    Command.DMA_UNMAP: Session._dma_unmap,
    Command.DEVICE_GET_INFO: Session._info,
    Command.DEVICE_GET_REGION_INFO: Session._region_info,
    Command.DEVICE_GET_REGION_IO_FDS: Session._io_fds,
    Command.DEVICE_GET_IRQ_INFO: Session._irq_info,
    Command.DEVICE_SET_IRQS: Session._set_irqs,
    Command.REGION_READ: Session._region_read,
    Command.REGION_WRITE: Session._region_write,
    Command.DEVICE_RESET: Session._reset,
}

"""Sessions with a server in this process, and a bare client that says what it likes."""

import os
import socket
import threading
from collections.abc import Iterable

from pileus.vfio_user.connection import Connection
from pileus.vfio_user.device import PciDevice
from pileus.vfio_user.protocol import HEADER, Command, Message
from pileus.vfio_user.server import serve_client

PATIENCE = 30.0


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


class Served:
    """``device`` is served on a thread; ``sock`` is the client's end."""

    def __init__(self, device: PciDevice) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, args=(ours, device), daemon=True)
        self._thread.start()

    def _serve(self, sock: socket.socket, device: PciDevice) -> None:
        try:
            serve_client(sock, device)
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        """Wait until the session has ended by itself; raises what should not have gone wrong in it."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()
        self.join()


class BareClient:
    """Asks one thing after the other. Owns ``sock``."""

    def __init__(self, sock: socket.socket) -> None:
        self.connection = Connection(sock, "the server")
        self.number = 0

    def greet(self, json: bytes = b"") -> Message:
        return self.ask(Message(Command.VERSION, 0, 1, tail=json))[0]

    def ask(self, message: Message, fds: Iterable[int] = ()) -> tuple[Message, list[int]]:
        self.number += 1
        message.number = self.number
        self.connection.send(message, fds)
        reply, given = self.connection.receive()
        assert reply.is_reply
        assert (reply.number, reply.command) == (self.number, message.command)
        return reply, given

    def read(self, region: int, offset: int, count: int) -> int:
        reply, _ = self.ask(Message(Command.REGION_READ, offset, region, count))
        assert not reply.failed, os.strerror(reply.error)
        return int.from_bytes(reply.tail, "little")

    def write(self, region: int, offset: int, count: int, value: int) -> None:
        data = value.to_bytes(count, "little")
        reply, _ = self.ask(Message(Command.REGION_WRITE, offset, region, count, tail=data))
        assert not reply.failed, os.strerror(reply.error)


def raw(command: int, payload: bytes, flags: int = 0, size: int | None = None) -> bytes:
    return HEADER.pack(1, command, HEADER.size + len(payload) if size is None else size, flags, 0) + payload

"""A vfio-user channel: messages and descriptors over a Unix stream socket, none of them without bounds.

One thread receives; any thread sends. Each descriptor that came with a message belongs to whoever received
it; those of a message that is refused are closed here.
"""

import _thread
import os
import socket
import struct

from pileus.errors import HostError, RemoteProtocolError
from pileus.vfio_user.protocol import MAX_FDS, Message, decode, encode, missing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SEND_TIMEOUT = 5  # seconds for a peer to read what we send
FD_SIZE = 4


class Connection:
    """One end of ``sock``, which it owns. ``peer`` names the other end in errors."""

    def __init__(self, sock: "socket.socket", peer: str) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_TIMEOUT, 0))
        self.peer = peer
        self._socket = sock
        self._fds: list[int] = []  # that came with what is being received
        self._sending = _thread.allocate_lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def shut_down(self) -> None:
        """End the conversation, also for a thread that waits in it; the socket stays open, and hangs up."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was first

    def close(self) -> None:
        self._socket.close()
        close_all(self._fds)

    def send(self, message: Message, fds: "Iterable[int]" = ()) -> None:
        """Send all of ``message``; the caller keeps ``fds``. Raises HostError."""
        data = encode(message)
        numbers = b"".join(fd.to_bytes(FD_SIZE, "little") for fd in fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        try:
            with self._sending:
                sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
                if sent < len(data):
                    self._socket.sendall(data[sent:])
        except BlockingIOError as error:
            raise HostError("talk to", self.peer, "it does not listen") from error
        except OSError as error:
            raise HostError("talk to", self.peer, error) from error

    def receive(self) -> "tuple[Message, list[int]]":
        """The next message and its descriptors, the caller's; waits for ever.

        Raises HostError, RemoteProtocolError.
        """
        buffer = bytearray()
        try:
            while wanted := missing(buffer):
                self._read(buffer, wanted)
            message = decode(bytes(buffer), len(self._fds))
        except RemoteProtocolError as error:
            close_all(self._fds)
            raise RemoteProtocolError(f"{self.peer}: {error}") from error
        except OSError as error:
            close_all(self._fds)
            raise HostError("hear from", self.peer, error) from error
        fds, self._fds = self._fds, []
        return message, fds

    def _read(self, buffer: bytearray, wanted: int) -> None:
        """Read no further than this message goes: what comes next may have descriptors of its own."""
        space = socket.CMSG_SPACE(MAX_FDS * FD_SIZE)
        data, ancillary, flags, _ = self._socket.recvmsg(wanted, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, numbers in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(numbers) - len(numbers) % FD_SIZE
                self._fds += [
                    int.from_bytes(numbers[at : at + FD_SIZE], "little") for at in range(0, whole, FD_SIZE)
                ]
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise RemoteProtocolError(f"more than {MAX_FDS} descriptors came with a message")
        if not data:
            close_all(self._fds)
            raise HostError("hear from", self.peer, "it hung up")
        buffer += data


def close_all(fds: list[int]) -> None:
    """Close ``fds`` and forget them."""
    while fds:
        os.close(fds.pop())

"""A vhost-user channel: messages and descriptors over a Unix stream socket, none of them without bounds.

A peer gets TIMEOUT seconds for what was asked of it, all messages together: one that hangs costs a pause.
Each descriptor that came with a message belongs to whoever received it; those of a message that is refused
are closed here.

Source: vhost-user specification, Communication
"""

import os
import socket
import stat
import time

from pileus.errors import HostError, RemoteProtocolError
from pileus.vhost_user.protocol import MAX_FDS, Call, Message, check_fds, decode, encode, missing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

TIMEOUT = 5.0  # seconds
FD_SIZE = 4


class Connection:
    """One end of ``sock``, which it owns. ``peer`` names the other end in errors.

    ``table`` is what is asked on this channel (FRONTEND or BACKEND of the protocol), and ``asks`` whether we
    are who asks. One thread at a time may use it, but ``shut_down`` any.
    """

    def __init__(self, sock: "socket.socket", peer: str, table: "dict[int, Call]", asks: bool) -> None:
        self.peer = peer
        self._socket = sock
        self._table = table
        self._asks = asks
        self._buffer = bytearray()
        self._fds: list[int] = []  # that came with what is in the buffer
        self._deadline = time.monotonic() + TIMEOUT

    def fileno(self) -> int:
        return self._socket.fileno()

    def allow(self, seconds: float = TIMEOUT) -> None:
        """From now on the peer has so long for all that is sent and received."""
        self._deadline = time.monotonic() + seconds

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
        data = encode(self._table, message)
        numbers = b"".join(fd.to_bytes(FD_SIZE, "little") for fd in fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        try:
            self._await_deadline()
            sent = self._socket.sendmsg([data], ancillary)
            if sent < len(data):
                self._await_deadline()
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise HostError("talk to", self.peer, self._reason(error)) from error

    def receive(self) -> "tuple[Message, list[int]]":
        """The next message and its descriptors, the caller's. Raises HostError, RemoteProtocolError."""
        try:
            while (message := self._decode()) is None:
                self._await_deadline()
                self._read()
        except OSError as error:
            raise HostError("hear from", self.peer, self._reason(error)) from error
        return message

    def receive_now(self) -> "tuple[Message, list[int]] | None":
        """Likewise, but None where it has not come wholly yet."""
        try:
            self._socket.settimeout(0)
            while (message := self._decode()) is None:
                self._read()
        except BlockingIOError:
            return None
        except OSError as error:
            raise HostError("hear from", self.peer, error) from error
        return message

    def _await_deadline(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _reason(self, error: OSError) -> object:
        return "it did not answer in time" if isinstance(error, TimeoutError) and not error.errno else error

    def _read(self) -> None:
        """Read no further than this message goes: what comes next may have descriptors of its own."""
        wanted = missing(self._table, self._buffer, self._asks)
        space = socket.CMSG_SPACE(MAX_FDS * FD_SIZE)
        data, ancillary, flags, _ = self._socket.recvmsg(wanted, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, numbers in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(numbers) - len(numbers) % FD_SIZE
                self._fds += [
                    int.from_bytes(numbers[at : at + FD_SIZE], "little") for at in range(0, whole, FD_SIZE)
                ]
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            close_all(self._fds)
            raise RemoteProtocolError(f"{self.peer}: more than {MAX_FDS} descriptors came with a message")
        if not data:
            close_all(self._fds)
            raise HostError("hear from", self.peer, "it hung up")
        self._buffer += data

    def _decode(self) -> "tuple[Message, list[int]] | None":
        try:
            message = decode(self._table, self._buffer, self._asks)
            if message is None:
                return None
            check_fds(self._table, message, len(self._fds))
        except RemoteProtocolError as error:
            close_all(self._fds)
            raise RemoteProtocolError(f"{self.peer}: {error}") from error
        fds, self._fds = self._fds, []
        return message, fds


def close_all(fds: list[int]) -> None:
    """Close ``fds`` and forget them."""
    while fds:
        os.close(fds.pop())


class Client:
    """Connects to a peer that listens at ``path``."""

    over = False  # others can come

    def __init__(self, path: str) -> None:
        self.path = path

    def attempt(self) -> "socket.socket | None":
        """A connection, or None while nobody listens. Raises HostError where trying again is no use."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(0)
            sock.connect(self.path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, InterruptedError):
            sock.close()
            return None
        except OSError as error:
            sock.close()
            raise HostError("connect to", self.path, error) from error
        return sock

    def fileno(self) -> int:
        """Nothing to wait for: it has to be tried."""
        return -1

    def last_words(self) -> str:
        """Nothing is known of why a peer failed."""
        return ""

    def close(self) -> None:
        pass


class Server:
    """Listens at ``path`` for one peer after the other. A socket left there by nobody alive is replaced."""

    over = False  # others can come

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _remove_stale(path)
            self._listener.bind(path)
            self._listener.listen(1)
            self._listener.settimeout(0)
            self._identity = _identity(path)
        except OSError as error:
            self._listener.close()
            raise HostError("listen on", path, error) from error

    def fileno(self) -> int:
        """Readable when somebody comes."""
        return self._listener.fileno()

    def attempt(self) -> "socket.socket | None":
        """A connection, or None while nobody comes."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            raise HostError("accept a connection on", self.path, error) from error
        return sock

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        """Also remove the socket file, if it is still ours."""
        self._listener.close()
        if _identity(self.path) == self._identity:
            os.unlink(self.path)


class Inherited:
    """The socket ``fd``, which it takes over: one that listens, or a connection, and then the only one.

    Raises HostError for a descriptor that is neither.
    """

    def __init__(self, fd: int) -> None:
        self.path = f"fd {fd}"
        self.over = False  # whether it was the one connection that there is to have
        try:
            self._socket = socket.socket(fileno=fd)
            self._listens = bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            if self._socket.family != socket.AF_UNIX or self._socket.type != socket.SOCK_STREAM:
                raise HostError("use", self.path, "it is no Unix stream socket")
            self._socket.set_inheritable(False)
            self._socket.settimeout(0)
        except OSError as error:
            raise HostError("use", self.path, error) from error

    def fileno(self) -> int:
        return self._socket.fileno() if self._listens else -1

    def attempt(self) -> "socket.socket | None":
        """A connection, or None while nobody comes. Raises HostError once nobody can."""
        try:
            if self._listens:
                return self._socket.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            raise HostError("accept a connection on", self.path, error) from error
        if self.over:
            raise HostError("wait for another front-end on", self.path, "it is a connection, and over")
        self.over = True
        return self._socket.dup()

    def close(self) -> None:
        self._socket.close()


def _remove_stale(path: str) -> None:
    """Where a socket is that nobody listens on, make room; anything else stays, and binding will say so."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0)
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass


def _identity(path: str) -> "tuple[int, int] | None":
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino

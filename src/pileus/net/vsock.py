"""The host's end of a guest's sockets, for programs: ordinary Unix sockets to and from its ports.

See docs/vsock.md for what goes over ``path``, the ``socket=`` of ``--vsock``.
"""

import os
import socket

from pileus.errors import HostError, RemoteProtocolError

ANSWER_LIMIT = 32  # bytes of "OK 4294967295\n"
BACKLOG = 128


def connect(path: str, port: int, timeout: float | None = None) -> socket.socket:
    """A socket connected to ``port`` of the guest, without a timeout of its own.

    Raises HostError where nothing listens at ``path`` or in the guest, and TimeoutError after ``timeout``
    seconds.
    """
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        one.settimeout(timeout)
        try:
            one.connect(path)
            one.sendall(b"CONNECT %d\n" % port)
            answer = _answer(one)
        except TimeoutError:
            raise
        except OSError as error:
            raise HostError(f"connect to port {port} of the guest at", path, error) from error
        if not answer:
            raise HostError(f"connect to port {port} of the guest at", path, "nothing listens there")
        if not answer.startswith(b"OK "):
            raise RemoteProtocolError(f"{path} answers {answer!r}, not OK")
        one.settimeout(None)
    except BaseException:
        one.close()
        raise
    return one


def listen(path: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A socket that accepts the guest's connections to ``port`` of the host. Its file is yours to remove.

    Raises HostError where it exists already, or the host refuses.
    """
    place = f"{path}_{port}"
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(one.fileno(), 0o600)
        one.bind(place)
        one.listen(backlog)
    except OSError as error:
        one.close()
        raise HostError("listen on", place, error if error.errno else str(error)) from error
    return one


def _answer(one: socket.socket) -> bytes:
    """The line that comes, byte by byte, for what follows it is data; empty where there is none."""
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < ANSWER_LIMIT:
        byte = one.recv(1)
        if not byte:
            return b""
        answer += byte
    return answer

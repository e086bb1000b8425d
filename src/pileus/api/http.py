"""HTTP/1.1 without a socket: bytes in, requests out; responses in, bytes out. h11 knows the protocol.

Answers are laid out for the parser of today's Rust client, which takes a reason phrase for a part of the
status and compares the names of headers byte by byte: ``HTTP/1.1 200 `` and ``Content-Length``.
"""

import json
import os

import h11

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_HEADER = 64 << 10  # bytes of the request line and all headers
MAX_BODY = 2 << 20
MAX_FDS = 64  # of one request; more are closed
SERVER = b"Cloud Hypervisor API"  # a client may look at it


class Request:
    """``fds`` came with it by SCM_RIGHTS; who keeps one duplicates it."""

    __slots__ = ("body", "fds", "method", "target")

    def __init__(self, method: str, target: str, body: bytes, fds: list[int]) -> None:
        self.method = method
        self.target = target
        self.body = body
        self.fds = fds

    def close(self) -> None:
        """Close the descriptors that came with it."""
        while self.fds:
            os.close(self.fds.pop())


class Response:
    """``body`` is what becomes JSON; None for none."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: "Any" = None, headers: "tuple[tuple[str, str], ...]" = ()) -> None:
        self.status = status
        self.body = body
        self.headers = headers


class RefusedError(Exception):
    """The conversation cannot go on: ``response`` is its last."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.response = Response(status, [sentence])


class Conversation:
    """One connection. Give it what was read, take requests, ``respond`` to each before taking the next."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER)
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._fds: list[int] = []
        self._bodyless = False  # the request taken last was HEAD
        self._interim = b""

    @property
    def over(self) -> bool:
        """No more requests will come."""
        return self._h11.their_state in (h11.CLOSED, h11.ERROR) or self._h11.our_state in (
            h11.MUST_CLOSE,
            h11.CLOSED,
            h11.ERROR,
        )

    @property
    def idle(self) -> bool:
        """Between two requests, with no byte of the next one."""
        return self._h11.their_state is h11.IDLE and not self._h11.trailing_data[0]

    def receive(self, data: bytes, fds: "list[int] | None" = None) -> None:
        """Take what was read, b"" for the end. Bytes that belong to no request any more are dropped."""
        self._fds += fds or ()
        while len(self._fds) > MAX_FDS:
            os.close(self._fds.pop())
        if not self.over:
            self._h11.receive_data(data)

    def next_request(self) -> Request | None:
        """The next request that is complete. Raises RefusedError."""
        try:
            return self._next_request()
        except h11.RemoteProtocolError as error:
            raise RefusedError(error.error_status_hint, f"The request is not HTTP/1.1: {error}.") from None

    def _next_request(self) -> Request | None:
        while True:
            event = self._h11.next_event()
            if isinstance(event, h11.Request):
                self._begin(event)
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > MAX_BODY:
                    raise _too_large()
            elif isinstance(event, h11.EndOfMessage):
                return self._end()
            else:
                return None  # NEED_DATA, PAUSED or ConnectionClosed

    def take_interim(self) -> bytes:
        """What is to be sent now, while a request is still on its way."""
        interim, self._interim = self._interim, b""
        return interim

    def respond(self, response: Response) -> bytes:
        """The bytes of ``response`` to the request taken last."""
        headers: list[tuple[bytes, bytes]] = [(b"Server", SERVER), (b"Connection", b"keep-alive")]
        body = b"" if response.body is None else json.dumps(response.body).encode()
        if response.body is not None:
            headers.append((b"Content-Type", b"application/json"))
        if response.status != 204:
            headers.append((b"Content-Length", b"%d" % len(body)))
        headers += [(name.encode(), value.encode()) for name, value in response.headers]
        data = self._send(h11.Response(status_code=response.status, headers=headers, reason=b""))
        data += self._send(h11.Data(data=body)) if body and not self._bodyless else b""
        data += self._send(h11.EndOfMessage())
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
        return data

    def refuse(self, error: RefusedError) -> bytes:
        """The bytes of the last response; none where HTTP allows none any more."""
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        headers = [(b"Server", SERVER), (b"Connection", b"close"), (b"Content-Type", b"application/json")]
        body = json.dumps(error.response.body).encode()
        headers.append((b"Content-Length", b"%d" % len(body)))
        event = h11.Response(status_code=error.response.status, headers=headers, reason=b"")
        data = self._send(event) + self._send(h11.Data(data=body)) + self._send(h11.EndOfMessage())
        self.close()
        return data

    def close(self) -> None:
        """Close the descriptors that belong to no request yet."""
        while self._fds:
            os.close(self._fds.pop())

    def _begin(self, head: h11.Request) -> None:
        self._head = head
        self._body.clear()
        for name, value in head.headers:
            if name == b"content-length" and int(value) > MAX_BODY:
                raise _too_large()
        if self._h11.they_are_waiting_for_100_continue:
            self._interim += self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b""))

    def _end(self) -> Request:
        assert self._head is not None
        fds, self._fds = self._fds, []
        head, self._head = self._head, None
        self._bodyless = head.method == b"HEAD"
        return Request(head.method.decode("ascii"), head.target.decode("ascii"), bytes(self._body), fds)

    def _send(self, event: h11.Event) -> bytes:
        return self._h11.send(event) or b""


def _too_large() -> RefusedError:
    return RefusedError(413, f"The body is larger than {MAX_BODY} bytes.")

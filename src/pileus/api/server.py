"""The server: its clients' sockets, on a loop and a thread of its own.

So ``vmm.ping`` and ``vm.info`` are answered while the control loop is busy, and no client, however slow or
hostile, takes the control loop's time. Each client holds at most MAX_HEADER and MAX_BODY of what it sent.
"""

import _thread
import array
import os
import socket
import time

from pileus import log
from pileus.api.http import Conversation, RefusedError, Request, Response
from pileus.errors import ConfigError, HostError
from pileus.listener import Listener
from pileus.vmm.loop import READABLE, WRITABLE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.config.model import ApiSocketConfig

    Handler = Callable[[Request, Callable[[Response], None]], None]

MAX_CLIENTS = 256
BACKLOG = 128
CHUNK = 64 << 10  # bytes read at once
MAX_FDS = 253  # of one message, SCM_MAX_FD
MAX_PENDING = 256 << 10  # bytes of answers that a client has not read, before it is asked no more
PATIENCE = 30.0  # seconds for a request to arrive whole, and for a client to read on
SWEEP = 5.0  # seconds between looks at who is late
NO_FDS_PAUSE = 1.0  # seconds until the next accept, where the host has no descriptors left
LAST_PATIENCE = 1.0  # seconds for the last answers to be read


class Server:
    """Hands requests to ``handler(request, answer)``, which calls ``answer(response)`` once, on any thread.

    Raises PileusError where ``config`` names no socket to listen on.
    """

    def __init__(self, config: "ApiSocketConfig", handler: "Handler") -> None:
        self._handler = handler
        self._listener, self._socket = _listen(config)
        self._loop = Loop()
        self._clients: set[_Client] = set()
        self._sweeping = False
        self._closing = False
        self._alive = _thread.allocate_lock()  # held while the thread lives
        self._loop.watch(self._socket.fileno(), READABLE, lambda _: self._accept())
        self._alive.acquire()
        _thread.start_new_thread(self._main, ())

    def close(self) -> None:
        """Send what was answered so far, and end."""
        self._loop.post(self._finish)
        with self._alive:
            pass
        for client in tuple(self._clients):
            client.close()
        self._loop.close()
        if self._listener is not None:
            self._listener.close()
        else:
            self._socket.close()

    def _main(self) -> None:
        try:
            with open(f"/proc/self/task/{_thread.get_native_id()}/comm", "w") as comm:
                comm.write("http-server")
            self._loop.run()
        except BaseException as error:
            log.exception(error)
        finally:
            self._alive.release()

    def _finish(self) -> None:
        self._closing = True
        self._loop.unwatch(self._socket.fileno())
        self._loop.after(LAST_PATIENCE, self._loop.stop)
        self._stop_when_done()

    def _stop_when_done(self) -> None:
        if self._closing and not any(client.pending for client in self._clients):
            self._loop.stop()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.limited(log.WARNING, f"API: cannot accept a client: {os.strerror(error.errno or 0)}")
            self._loop.change(self._socket.fileno(), 0)
            self._loop.after(NO_FDS_PAUSE, lambda: self._loop.change(self._socket.fileno(), READABLE))
            return
        if len(self._clients) == MAX_CLIENTS:
            min(self._clients, key=lambda each: (each.waiting, each.busy, each.moved)).close()
        connection.setblocking(False)
        self._clients.add(_Client(connection, self))

    # -- what clients need --------------------------------------------------------------------------

    def handle(self, request: Request, answer: "Callable[[Response], None]") -> None:
        self._handler(request, answer)

    def post(self, call: "Callable[[], None]") -> None:
        self._loop.post(call)

    def watch(self, client: "_Client", events: int) -> None:
        self._loop.watch(client.socket.fileno(), events, client.ready)

    def change(self, client: "_Client", events: int) -> None:
        self._loop.change(client.socket.fileno(), events)

    def forget(self, client: "_Client") -> None:
        self._clients.discard(client)
        self._loop.unwatch(client.socket.fileno())
        self._stop_when_done()

    def moved(self) -> None:
        """A client has something under way, or no more."""
        self._stop_when_done()
        if not self._sweeping and any(client.busy for client in self._clients):
            self._sweeping = True
            self._loop.after(SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Close who is late. Nothing wakes for clients that are idle or wait for us."""
        self._sweeping = False
        now = time.monotonic()
        for client in tuple(self._clients):
            if client.busy and now - client.moved > PATIENCE:
                client.close()
        self.moved()


class _Client:
    """One connection, on the server's thread."""

    def __init__(self, connection: socket.socket, server: Server) -> None:
        self.socket = connection
        self.waiting = False  # for the answer to its request
        self.moved = time.monotonic()  # when it began its request, or read some of our answer
        self._server = server
        self._talk = Conversation()
        self._out = bytearray()
        self._events = READABLE
        self._asking = False
        self._ended = False  # it sends no more
        self._last = False  # what is pending is all that it gets
        server.watch(self, READABLE)

    @property
    def pending(self) -> int:
        """Bytes that it is to read yet."""
        return len(self._out)

    @property
    def busy(self) -> bool:
        """It is the client's turn, in the middle of a request or of an answer."""
        return bool(self._out) or not (self.waiting or self._talk.idle)

    def ready(self, events: int) -> None:
        try:
            if events & WRITABLE:
                self._write()
            if events & READABLE and self._events & READABLE:
                self._read()
            elif events & ~(READABLE | WRITABLE):  # it is gone, also if it waits for an answer
                self.close()
                return
            self._go_on()
        except OSError:
            self.close()
        except Exception as error:  # a bug; the other clients need not suffer from it
            log.exception(error)
            self.close()

    def close(self) -> None:
        if self.socket.fileno() < 0:
            return
        self._server.forget(self)
        self._talk.close()
        self.socket.close()

    def _read(self) -> None:
        if self._talk.idle:
            self.moved = time.monotonic()
        try:
            data, ancillary, _, _ = self.socket.recvmsg(
                CHUNK, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        self._ended = not data
        self._talk.receive(data, _descriptors(ancillary))

    def _go_on(self) -> None:
        """Take requests as long as there are some and the client reads its answers."""
        if self._asking:
            return
        self._asking = True
        while not (self.waiting or self._last or len(self._out) > MAX_PENDING):
            try:
                request = self._talk.next_request()
            except RefusedError as error:
                self._out += self._talk.refuse(error)
                self._last = True
                break
            self._out += self._talk.take_interim()
            if request is None:
                self._last = self._talk.over or self._ended
                break
            self.waiting = True
            self._ask(request)
        self._asking = False
        self._write()
        self._settle()

    def _ask(self, request: Request) -> None:
        """The answer may come at once, or later from another thread."""
        here = _thread.get_ident()

        def answer(response: Response) -> None:
            if _thread.get_ident() == here:
                self._answer(request, response)
            else:
                self._server.post(lambda: self._answer(request, response))

        self._server.handle(request, answer)

    def _answer(self, request: Request, response: Response) -> None:
        request.close()
        if self.socket.fileno() < 0:
            return
        self.waiting = False
        self.moved = time.monotonic()
        self._out += self._talk.respond(response)
        self._last = self._last or self._talk.over
        if not self._asking:
            self.ready(0)

    def _write(self) -> None:
        if self._out:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return
            del self._out[:sent]
            self.moved = time.monotonic()

    def _settle(self) -> None:
        """Wait for what there is to wait for."""
        if self._last and not self._out:
            self.close()
            return
        reading = not (self.waiting or self._last or self._ended or len(self._out) > MAX_PENDING)
        events = (READABLE if reading else 0) | (WRITABLE if self._out else 0)
        if events != self._events:
            self._events = events
            self._server.change(self, events)
        self._server.moved()


def _listen(config: "ApiSocketConfig") -> tuple[Listener | None, socket.socket]:
    """The socket of ``config``, and what removes its file in the end."""
    if config.fd is not None:
        return None, _adopt(config.fd)
    try:
        listener = Listener(config.where, BACKLOG)
    except OSError as error:
        raise HostError("listen for API clients on", config.where, error) from error
    return listener, listener.socket


def _adopt(fd: int) -> socket.socket:
    """The inherited socket ``fd``, which listens already."""
    allowed = "an open Unix stream socket that listens is needed"
    try:
        inherited = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError("--api-socket fd", fd, allowed) from error
    listens = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if inherited.family != socket.AF_UNIX or inherited.type != socket.SOCK_STREAM or not listens:
        inherited.detach()
        raise ConfigError("--api-socket fd", fd, allowed)
    inherited.setblocking(False)
    os.set_inheritable(fd, False)
    return inherited


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The file descriptors in what came beside the data."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()

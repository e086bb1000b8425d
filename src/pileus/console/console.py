"""What all host ends share: input with back-pressure, and draining what the other end left waiting."""

import os
import select
import time

from pileus.console._sink import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, Self

    class Port(Protocol):
        """A device's end of a console. Called on the loop's thread."""

        @property
        def room_fd(self) -> int:
            """An eventfd: readable once ``feed``, after it took too little, is worth another try."""

        def feed(self, data: bytes) -> int:
            """Take input for the guest; return how many bytes there was room for."""

        def output_ready(self) -> None:
            """The sink has room again."""

        def resize(self, columns: int, rows: int) -> None:
            """The terminal has this size now; 0 by 0 where it does not tell."""

    class Loop(Protocol):
        """What a console needs of the control loop."""

        def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None: ...
        def change(self, fd: int, events: int) -> None: ...
        def unwatch(self, fd: int) -> None: ...


READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
CHUNK = 4096  # bytes read at once, and so the most that is held for a guest that does not read

LAST_PATIENCE = 1.0  # seconds that close() waits for a reader


class Console:
    """The null console, and the base of the others: output goes nowhere, and there is no input.

    ``start`` and ``stop`` frame its use of a loop; ``connect`` and ``disconnect`` frame each VM's device,
    whose output goes to ``sink``. All methods belong to the loop's thread.
    """

    path: str | None = None  # what a client opens: the pty, the socket
    input_trigger = 0  # EPOLLET where the end of input is no reason to stop watching

    def __init__(self, name: str = "console", warn: "Callable[[str], None] | None" = None) -> None:
        self.name = name
        self.sink = Sink()
        self._warn = warn
        self._loop: Loop | None = None
        self._port: Port | None = None
        self._input = -1  # what is read, -1: nothing
        self._output = -1  # what the sink writes to, which may be the same
        self._held = b""  # input the port had no room for
        self._watched: dict[int, int] = {}  # fd -> events

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, loop: "Loop") -> None:
        """Serve on ``loop`` from now on."""
        self._loop = loop
        loop.watch(self.sink.wake_fd, READABLE, lambda _: self._drain())
        self._watch()

    def stop(self) -> None:
        """Leave the loop. Output goes on as far as the other end takes it at once."""
        self.disconnect()
        if (loop := self._loop) is not None:
            self._loop = None
            for fd in (self.sink.wake_fd, *self._watched):
                loop.unwatch(fd)
            self._watched.clear()

    def connect(self, port: "Port") -> None:
        """Give input to ``port``, whose output goes to ``sink``; needs ``start`` before."""
        assert self._loop is not None, "start the console first"
        self.disconnect()
        self._port = port
        self._loop.watch(port.room_fd, READABLE, lambda _: self._room())
        self._deliver(b"")
        port.output_ready()
        self.resized()

    def disconnect(self) -> None:
        """Keep further input for the next port: as much as one read, the rest stays where it is."""
        if self._port is not None and self._loop is not None:
            self._loop.unwatch(self._port.room_fd)
        self._port = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of the other end; zeros where there are none, or it does not tell."""
        return 0, 0

    def resized(self) -> None:
        """The other end may have another size: tell the port."""
        if self._port is not None:
            self._port.resize(*self.size)

    def restart(self) -> None:
        """The guest reboots."""

    def close(self) -> None:
        """Give back all that the host lent. A slow reader gets a second more. Closing twice is harmless."""
        self._flush(LAST_PATIENCE)
        self.stop()
        self.sink.close()
        for fd in {self._input, self._output} - {-1}:
            os.close(fd)
        self._input = self._output = -1

    def _flush(self, seconds: float) -> None:
        """Wait for the other end to take what is pending: what a guest said last matters most."""
        deadline = time.monotonic() + seconds
        while self.sink.drain() and (patience := deadline - time.monotonic()) > 0:
            writable = select.poll()
            writable.register(self._output, select.POLLOUT)
            writable.poll(patience * 1000)

    def _watch(self) -> None:
        """Watch what there is a reason to watch, and nothing else: a hang-up would wake the loop for ever."""
        if self._loop is None:
            return
        wanted = self._wanted()
        for fd in [fd for fd in self._watched if fd not in wanted]:
            self._loop.unwatch(fd)
            del self._watched[fd]
        for fd, events in wanted.items():
            if fd not in self._watched:
                self._loop.watch(fd, events, self._watcher(fd))
            elif self._watched[fd] != events:
                self._loop.change(fd, events)
        self._watched = wanted

    def _wanted(self) -> dict[int, int]:
        wanted = {}
        if self._input >= 0 and not self._held:
            wanted[self._input] = READABLE | self.input_trigger
        if self._output >= 0 and self.sink.pending:
            wanted[self._output] = wanted.get(self._output, 0) | WRITABLE
        return wanted

    def _watcher(self, fd: int) -> "Callable[[int], None]":
        def ready(events: int) -> None:
            if fd == self._output and events & ~READABLE:
                self._drain()
            if fd == self._input and events & ~WRITABLE:
                self._read()
                self._watch()

        return ready

    def _drain(self) -> None:
        """The other end may take more; then so may the sink."""
        self.sink.drain()
        if (error := self.sink.take_error()) and self._warn is not None:
            self._warn(f"{self.name}: output is being lost: {os.strerror(error)}")
        if self._port is not None:
            self._port.output_ready()
        self._watch()

    def _read(self) -> bool:
        """Read once; return whether there may be more."""
        try:
            data = os.read(self._input, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._deliver(self._translate(data))
        else:
            self._input_ended()
        return bool(data)

    def _translate(self, data: bytes) -> bytes:
        """What the guest shall see of ``data``."""
        return data

    def _input_ended(self) -> None:
        """The other end will send no more, or is gone."""
        self._close_input()

    def _close_input(self) -> None:
        if (fd := self._input) < 0:
            return
        self._input = -1
        self._watch()
        if fd != self._output:
            os.close(fd)

    def _room(self) -> None:
        """The port has room again."""
        assert self._port is not None
        os.eventfd_read(self._port.room_fd)
        self._deliver(b"")
        self._watch()

    def _deliver(self, data: bytes) -> None:
        self._held += data
        if self._held and self._port is not None:
            self._held = self._held[self._port.feed(self._held) :]

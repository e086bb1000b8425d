import os
import time
from collections.abc import Callable, Iterator

import pytest

from pileus.console import Console
from pileus.vmm.loop import Loop

PATIENCE = 10.0  # seconds after which something will not happen any more


class FakePort:
    """A device's end: takes input up to ``room`` bytes, and counts its chances to send."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.room = room
        self.got = b""
        self.chances = 0
        self.sizes: list[tuple[int, int]] = []

    def feed(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.got += taken
        return len(taken)

    def make_room(self, room: int) -> None:
        self.room = room
        os.eventfd_write(self.room_fd, 1)

    def output_ready(self) -> None:
        self.chances += 1

    def resize(self, columns: int, rows: int) -> None:
        self.sizes.append((columns, rows))

    def close(self) -> None:
        os.close(self.room_fd)


class Bench:
    """A loop and a port for one console; ``calls`` counts what the loop did."""

    def __init__(self) -> None:
        self.loop = CountingLoop()
        self.port = FakePort()
        self.warnings: list[str] = []

    def serve(self, console: Console) -> None:
        console.start(self.loop)
        console.connect(self.port)

    def turn(self) -> int:
        """Let the loop handle what is ready now; return how much that was."""
        before = self.loop.calls
        self.loop.after(0, self.loop.stop)
        self.loop.run()
        return self.loop.calls - before

    def until(self, happened: Callable[[], object]) -> None:
        """Serve until ``happened``: for what the kernel passes on in its own time."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, "it does not happen"
            self.loop.after(0.002, self.loop.stop)
            self.loop.run()

    def settle(self) -> None:
        """Serve until nothing is left to do: fails where an event comes back for ever."""
        quiet = 0
        for _ in range(1000):
            quiet = 0 if self.turn() else quiet + 1
            if quiet == 20:
                return
        raise AssertionError("the loop spins")

    def close(self) -> None:
        self.port.close()
        self.loop.close()


class CountingLoop(Loop):
    calls = 0

    def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        def counted(ready: int) -> None:
            self.calls += 1
            call(ready)

        super().watch(fd, events, counted)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture(autouse=True)
def _no_fd_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before

"""What the tests of vhost-user share: back-ends that are real programs, and requests for them."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pileus.testing import FakeDriver
from pileus.vhost_user.devices.device import VhostUserDevice
from pileus.vmm.loop import Loop
from tests.listening import PATIENCE, await_listener

PEERS = Path(__file__).parents[2] / ".cache" / "peers"
PROGRAMS = PEERS / "bin"
LIBRARIES = PEERS / "usr/lib/x86_64-linux-gnu"


class Backend:
    """A program that serves ``socket``; ``kill`` and ``start`` it at will."""

    def __init__(self, command: list[str], socket: Path) -> None:
        self.command = command
        self.socket = socket
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        await_listener(self.process, self.socket)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


@contextmanager
def driving(make: Callable[[Loop], VhostUserDevice]) -> Iterator[FakeDriver]:
    """The driver of a device, whose loop turns on a thread of its own."""
    loop = Loop()
    thread = threading.Thread(target=loop.run)
    driver = FakeDriver(make(loop), shared=True)
    thread.start()
    try:
        yield driver
    finally:
        loop.post(loop.stop)
        thread.join(PATIENCE)
        driver.close()
        loop.close()


def missing(program: str) -> bool:
    """Whether ``scripts/setup test`` did not fetch it."""
    return not (PROGRAMS / program).exists()

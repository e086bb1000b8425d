import os
from collections.abc import Iterator

import pytest

from pileus.bus import Bus
from pileus.console import Sink
from pileus.console._sink import WRITE
from pileus.devices.serial import Serial

BASE = 0x3F8


class Guest:
    """A serial port as its guest and its host see it. Output goes to a pipe of one page."""

    def __init__(self) -> None:
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.output, self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.sink = Sink()
        self.sink.attach(self._pipe, WRITE)
        self.serial = Serial(self.sink, self.call_fd)
        self.bus = Bus("ports")
        self.bus.insert(BASE, 8, self.serial)

    def inb(self, register: int) -> int:
        return self.bus.load(BASE + register, 1)

    def outb(self, register: int, value: int) -> None:
        self.bus.store(BASE + register, 1, value)

    def edges(self) -> int:
        """Interrupts since the last call."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def read_output(self, size: int = 1 << 20) -> bytes:
        try:
            return os.read(self.output, size)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.serial.close()
        self.sink.close()
        for fd in (self.call_fd, self.output, self._pipe):
            os.close(fd)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()

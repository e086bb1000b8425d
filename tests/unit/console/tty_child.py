"""A program with a console on its terminal, for test_tty.py: says what it got, and ends as it is told."""

import ctypes
import os
import sys

from pileus.console import open_console
from pileus.vmm.loop import Loop


class Port:
    """Says what was typed; a key of ENDS ends the program that way."""

    def __init__(self) -> None:
        self.room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def feed(self, data: bytes) -> int:
        say(f"got {data!r}")
        if data in ENDS:
            ENDS[data]()
        return len(data)

    def output_ready(self) -> None:
        pass

    def resize(self, columns: int, rows: int) -> None:
        pass


def say(text: str) -> None:
    os.write(2, text.encode() + b"\r\n")


def fail() -> None:
    raise RuntimeError("as told")


def segfault() -> None:
    ctypes.string_at(0)


ENDS = {b"E": sys.exit, b"F": fail, b"S": segfault, b"A": os.abort}


def main() -> None:
    loop = Loop()
    console = open_console("tty", quit=loop.stop)
    console.start(loop)
    console.connect(Port())
    console.sink.write(b"a\nb\r\n")
    say(f"ready {os.getpid()}")
    loop.run()
    if "leave" in sys.argv:  # without closing: atexit restores
        return
    console.close()
    say("closed")


main()

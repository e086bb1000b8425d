"""vsock streams and round trips, beside a plain pair of Unix sockets with the same process at the far end.

The guest is a compiled driver in memory that behaves as Linux's: see pileus.testing._sockets.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.bench import Options, Row, compare
from support.host import PYTHON, ROOT, ScriptError

GOALS = ("build",)
PEER = "socketpair"
TOTAL = 2 << 30
WRITE = 64 << 10
MESSAGES = 20_000
MESSAGE = 64
GOAL = 0.5  # DESIGN section 4: half of what a Unix socket gives
CID = 3
# The far end: a process of its own that is handed its socket. What it does ends with a byte back.
CLIENT = """
import socket, sys, time
one, what, total, size = socket.socket(fileno=0), sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if what == "write":
    block = bytes(size)
    for _ in range(total // size):
        one.sendall(block)
elif what == "read":
    block = bytearray(size)
    while total:
        total -= one.recv_into(block)
else:
    block = bytes(size)
    for _ in range(total):
        one.sendall(block)
        left = size
        while left:
            left -= len(one.recv(left))
"""


def run(options: Options) -> list[Row]:
    sys.path.insert(0, str(ROOT / "src"))
    runs = options.runs or 5
    figures: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(runs):
        for metric, measure in MEASURES.items():
            own, peer = figures.setdefault(metric, ([], []))
            own.append(measure(_ours))
            peer.append(measure(_plain))
    return [
        compare(
            metric, "us" if "round trip" in metric else "s/GiB", *_for(figures[metric]), goal=_goal(metric)
        )
        for metric in MEASURES
    ]


def _for(pair: tuple[list[float], list[float]]) -> tuple[list[float], str, list[float]]:
    return pair[0], PEER, pair[1]


def _goal(metric: str) -> float:
    return 0 if "round trip" in metric else GOAL


def _ours(what: str, total: int, size: int) -> float:
    """Seconds that it takes by way of a device."""
    from pileus.net.unix_socket import Listener
    from pileus.testing import FakeDriver
    from pileus.testing._sockets import SocketGuest
    from pileus.virtio import status
    from pileus.virtio.devices.vsock import RX, TX, Vsock

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as client:
        device = Vsock("bench", Listener(str(Path(folder, "s"))), CID)
        driver = FakeDriver(device, ranges=[(0, 16 << 20)], start=False)
        try:
            guest = SocketGuest(driver.memory, CID)
            driver.negotiate()
            ring: Any
            for index, ring in ((RX, guest.rx), (TX, guest.tx)):
                driver.set_up_queue(index, ring)
            driver.control.set_status(driver.status | status.DRIVER_OK)
            queues = device.queues
            guest.start(queues[RX].kick_fd, queues[RX].call_fd, queues[TX].kick_fd, queues[TX].call_fd)
            client.connect(device.listener.path)
            client.sendall(b"CONNECT 1024\n")
            guest.accept()
            if not client.recv(64).startswith(b"OK "):
                raise ScriptError("the device does not connect")
            process, started = _start(client, what, total, size)
            if what == "read":
                guest.send(total, size)
            elif what == "write":
                guest.receive(total)
            else:
                guest.echo(total, size)
            return _finish(process, started)
        finally:
            driver.close()


def _plain(what: str, total: int, size: int) -> float:
    """Seconds that it takes between two processes, a socket each."""
    ours, theirs = socket.socketpair()
    with ours:
        process, started = _start(theirs, what, total, size)
        theirs.close()
        block = bytearray(size)
        if what == "read":
            for _ in range(total // size):
                ours.sendall(block)
        elif what == "write":
            left = total
            while left:
                left -= ours.recv_into(block)
        else:
            for _ in range(total):
                ours.sendall(ours.recv(size))
        return _finish(process, started)


def _start(one: socket.socket, what: str, total: int, size: int) -> tuple[subprocess.Popen[bytes], float]:
    command = [str(PYTHON), "-I", "-c", CLIENT, what, str(total), str(size)]
    return subprocess.Popen(command, stdin=one.fileno()), time.perf_counter()


def _finish(process: subprocess.Popen[bytes], started: float) -> float:
    if process.wait():
        raise ScriptError("the far end failed")
    return time.perf_counter() - started


def _stream(way: str, size: int) -> Any:
    total = int(os.environ.get("PILEUS_BENCH_BYTES", TOTAL))
    return lambda by: by(way, total, size) * (1 << 30) / total


MEASURES = {
    "guest to host, 64 KiB writes": _stream("read", WRITE),
    "host to guest, 64 KiB writes": _stream("write", WRITE),
    "guest to host, 4 KiB writes": _stream("read", 4096),
    "round trip of 64 bytes": lambda by: by("echo", MESSAGES, MESSAGE) * 1e6 / MESSAGES,
}

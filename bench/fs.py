"""Shared directories: CPU time of pileus-fs for a request, beside virtiofsd's, as one driver asks both.

The driver is plain Python, which takes longer than either server: rates would say how fast that is. So a
figure is what the threads of the server spend on one request. The directory is on a disk of this host, its
files in the page cache.
"""

import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bench import Options, Row, compare
from support.host import ROOT, VENV, ScriptError
from support.peers import PEERS

sys.path.insert(0, str(ROOT / "src"))

GOALS = ("bench", "test")
VIRTIOFSD, OWN = "virtiofsd", "pileus-fs"
REQUESTS = 2000
QUEUE = 1
PATIENCE = 20.0
MIB = 1 << 20


class Driver:
    """Asks a server; each method is one or two requests."""

    def __init__(self, driver) -> None:  # type: ignore[no-untyped-def]
        from pileus.fs import abi

        self._driver = driver
        self._abi = abi
        self.ask(abi.INIT, 0, abi.INIT_IN.pack(7, 31, 1 << 17, 0))
        (self.file,) = struct.unpack_from("<Q", self.ask(abi.LOOKUP, 1, b"file\0"))
        (self.handle,) = struct.unpack_from(
            "<Q", self.ask(abi.OPEN, self.file, abi.OPEN_IN.pack(os.O_RDWR, 0))
        )

    def ask(self, opcode: int, node: int, body: bytes = b"", room: int = 4096) -> bytes:
        header = self._abi.IN_HEADER.pack(self._abi.IN_HEADER.size + len(body), opcode, 1, node, 0, 0, 1, 0)
        head = self._driver.add(
            [header, body] if body else [header], [self._abi.OUT_HEADER.size, room], queue=QUEUE
        )
        self._driver.kick(QUEUE)
        self._driver.wait(QUEUE)
        answer: bytes = self._driver.read(head, QUEUE)
        length, error, _ = self._abi.OUT_HEADER.unpack_from(answer)
        if error:
            raise ScriptError(f"request {opcode}: {os.strerror(-error)}")
        return answer[self._abi.OUT_HEADER.size : length]

    def look_up(self) -> None:
        self.ask(self._abi.LOOKUP, 1, b"file\0")

    def attributes(self) -> None:
        self.ask(self._abi.GETATTR, self.file, self._abi.GETATTR_IN.pack(0, 0))

    def read(self, size: int) -> None:
        self.ask(self._abi.READ, self.file, self._abi.READ_IN.pack(self.handle, 0, size, 0, 0, 0), size)

    def write(self, size: int) -> None:
        body = self._abi.WRITE_IN.pack(self.handle, 0, size, 0, 0, 0) + bytes(size)
        self.ask(self._abi.WRITE, self.file, body)

    def make_and_remove(self) -> None:
        abi = self._abi
        entry = self.ask(abi.CREATE, 1, abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"new\0")
        (handle,) = struct.unpack_from("<Q", entry, abi.ENTRY_OUT.size + abi.ATTRIBUTES.size)
        (node,) = struct.unpack_from("<Q", entry)
        self.ask(abi.RELEASE, node, abi.RELEASE_IN.pack(handle, 0, 0, 0))
        self.ask(abi.UNLINK, 1, b"new\0")


CASES: dict[str, tuple[int, Callable[[Driver], None]]] = {
    "lookup": (1, Driver.look_up),
    "attributes": (1, Driver.attributes),
    "read 4 KiB": (1, lambda driver: driver.read(4096)),
    "read 256 KiB": (8, lambda driver: driver.read(256 << 10)),
    "write 4 KiB": (1, lambda driver: driver.write(4096)),
    "write 256 KiB": (8, lambda driver: driver.write(256 << 10)),
    "create, release, unlink": (4, Driver.make_and_remove),
}


def run(options: Options) -> list[Row]:
    if os.geteuid() != 0:
        raise ScriptError("virtiofsd serves as root only")
    found: dict[str, dict[str, list[float]]] = {OWN: {}, VIRTIOFSD: {}}
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        folder, socket = Path(scratch, "shared"), Path(scratch, "socket")
        folder.mkdir()
        (folder / "file").write_bytes(bytes(MIB))
        commands = {
            OWN: [str(VENV / "bin" / OWN), "--backend", f"path={folder}", "--socket", str(socket)],
            VIRTIOFSD: [
                str(PEERS / "bin" / VIRTIOFSD), "--socket-path", str(socket), "--shared-dir", str(folder),
                "--sandbox", "none", "--seccomp", "none", "--log-level", "error", "--xattr",
            ],
        }  # fmt: skip
        for _ in range(options.runs or 3):
            for name, command in commands.items():
                with _served(command, socket) as (pid, driver):
                    for case, (share, ask) in CASES.items():
                        found[name].setdefault(case, []).append(_cost(pid, driver, ask, REQUESTS // share))
    return [
        compare(
            f"{case}, CPU of the server", "us", found[OWN][case], VIRTIOFSD, found[VIRTIOFSD][case], goal=0
        )
        for case in CASES
    ]


def _cost(pid: int, driver: Driver, ask: Callable[[Driver], None], count: int) -> float:
    """Microseconds of the server's CPU for each call of ``ask``."""
    for _ in range(count // 10):
        ask(driver)
    before = _cpu_seconds(pid)
    for _ in range(count):
        ask(driver)
    return (_cpu_seconds(pid) - before) / count * 1e6


def _cpu_seconds(pid: int) -> float:
    return (
        sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
        / 1e9
    )


@contextmanager
def _served(command: list[str], socket: Path) -> Iterator[tuple[int, Driver]]:
    from pileus.loop import Loop
    from pileus.testing import FakeDriver
    from pileus.vhost_user.connection import Client
    from pileus.vhost_user.devices.fs import VhostUserFs

    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not socket.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    loop = Loop()
    thread = threading.Thread(target=loop.run)
    try:
        device = VhostUserFs("fs0", "--fs", Client(str(socket)), loop, tag="bench", queue_size=16)
        with FakeDriver(device, shared=True) as driver:
            thread.start()
            try:
                yield process.pid, Driver(driver)
            finally:
                loop.post(loop.stop)
                thread.join()
    finally:
        loop.close()
        process.kill()
        process.wait()
        socket.unlink(missing_ok=True)

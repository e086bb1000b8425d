"""A VMM that serves its API in this process, and clients of it."""

import http.client
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pileus.api.routes import ROOT
from pileus.api.serve import serve
from pileus.api.server import Server
from pileus.config.model import ApiSocketConfig, VmConfig, VmmConfig
from pileus.vmm.control import Control
from pileus.vmm.vmm import run

PATIENCE = 30  # seconds


class Client(http.client.HTTPConnection):
    """A client of the socket at ``path``, on one connection."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path)

    def ask(self, method: str, name: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body of the answer to the call ``name``."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        self.request(method, ROOT + name, body=data)
        answer = self.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None

    def get(self, name: str) -> tuple[int, Any]:
        return self.ask("GET", name)

    def put(self, name: str, body: Any = None) -> int:
        """The status alone."""
        return self.ask("PUT", name, body)[0]


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))  # before the timeout: one that must not wait fails while others queue
    except OSError:
        connection.close()
        raise
    connection.settimeout(PATIENCE)
    return connection


class Api:
    """A VMM on a thread of its own, serving at ``path``. ``status`` is what it ended with."""

    def __init__(self, path: Path, vm: VmConfig | None = None) -> None:
        self.path = path
        self.status: int | None = None
        self.error: BaseException | None = None
        self.server: Server | None = None
        self._ready = threading.Event()
        self._clients: list[Client] = []
        self._config = VmmConfig(vm=vm, api_socket=ApiSocketConfig(path=str(path)))
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            with suppress(OSError):  # it ended, or is about to
                self.client().put("vmm.shutdown")
        self.join()
        for client in self._clients:
            client.close()

    def client(self) -> Client:
        """A new client, which is closed in the end."""
        self._clients.append(Client(self.path))
        return self._clients[-1]

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the VMM does not end"

    def _run(self) -> None:
        try:
            self.status = run(self._config, self._serve)
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    def _serve(self, vmm: Control) -> Server:
        assert self._config.api_socket is not None
        self.server = serve(self._config.api_socket, vmm)
        self._ready.set()
        return self.server


class FakeDump:
    """A core of 100 bytes, of which 10 are looked at; the rest once ``go`` is set."""

    size = 100

    def __init__(self) -> None:
        self.go = threading.Event()
        self.error: Exception | None = None

    def write(self, advance: Callable[[int], None]) -> None:
        advance(10)
        while not self.go.wait(0.005):
            advance(0)
        if self.error is not None:
            raise self.error
        advance(90)


class FakeVm:
    """Stands for a built VM, which nothing on this host knows of."""

    def __init__(self) -> None:
        self.paused = self.started = False
        self.dumps: dict[str, FakeDump] = {}
        self.waits = False  # a dump does, to be told to go on

    def start(self) -> None:
        self.started = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def coredump(self, path: str) -> FakeDump:
        dump = self.dumps[path] = FakeDump()
        if not self.waits:
            dump.go.set()
        return dump

    def send_nmi(self) -> None:
        pass

    def press_power_button(self) -> None:
        pass

    def stop(self) -> None:
        self.started = False

    def close(self) -> None:
        pass

    def usage(self) -> list[str]:
        return []

    def counters(self) -> dict[str, dict[str, int]]:
        return {"_net0": {"rx_bytes": 1}}

"""A client of the HTTP API: a method per call, plain results, one exception.

Also of a Cloud Hypervisor: bodies hold only what is set, in the words of today.
"""

import http.client
import json
import os
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from pileus.config import wire
from pileus.config.model import VmConfig
from pileus.errors import ApiError, HostError, RemoteProtocolError

ROOT = "/api/v1/"
SUCCESS = (200, 204)


class Ping(NamedTuple):
    """Who answers. ``version`` is the release of Cloud Hypervisor whose API it is."""

    version: str
    build_version: str
    pid: int
    features: list[str]


class Operation(NamedTuple):
    """What takes long: ``done`` of ``total`` bytes are."""

    name: str
    done: int
    total: int


class Info(NamedTuple):
    """What a VM is: ``config`` as JSON has it (docs/api.md), ``memory_actual_size`` in bytes."""

    state: str
    config: dict[str, Any]
    memory_actual_size: int
    operation: Operation | None  # that is under way


class Client:
    """The VMM that listens at the Unix socket ``path``. Threads may share one: each call has its connection.

    A call raises ApiError where the VMM says no, HostError where nobody is there or ``timeout`` seconds (None
    for any number) are over, and RemoteProtocolError where what answers is no VMM.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = None) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Client({self.path!r})"

    # -- the VMM -----------------------------------------------------------------------------------

    def ping(self) -> Ping:
        """Who is there."""
        body = _object(self.call("GET", "vmm.ping"))
        return Ping(
            body["version"], body.get("build_version", ""), body.get("pid", 0), body.get("features", [])
        )

    def shutdown_vmm(self) -> None:
        """Delete the VM and end the process."""
        self.call("PUT", "vmm.shutdown")

    def openapi(self) -> dict[str, Any]:
        """The description of the whole API."""
        return _object(self.call("GET", "openapi.json"))

    # -- the VM ------------------------------------------------------------------------------------

    def create(self, config: VmConfig | Mapping[str, Any]) -> None:
        """Keep the configuration of a VM: one of ours, or as JSON has it."""
        body = _without_null(wire.encode(config)) if isinstance(config, VmConfig) else dict(config)
        self.call("PUT", "vm.create", body)

    def boot(self) -> None:
        """Build the VM and let it run."""
        self.call("PUT", "vm.boot")

    def info(self) -> Info:
        """Configuration and state. ApiError 404: there is no VM."""
        body = _object(self.call("GET", "vm.info"))
        under_way = body.get("operation")
        operation = Operation(**under_way) if under_way else None
        return Info(body["state"], body["config"], body.get("memory_actual_size", 0), operation)

    def pause(self) -> None:
        """Stop it; nobody touches its memory once this returns."""
        self.call("PUT", "vm.pause")

    def resume(self) -> None:
        """Let it go on."""
        self.call("PUT", "vm.resume")

    def shutdown(self) -> None:
        """End the VM without asking the guest; its configuration stays."""
        self.call("PUT", "vm.shutdown")

    def reboot(self) -> None:
        """The same, and boot it again."""
        self.call("PUT", "vm.reboot")

    def delete(self) -> None:
        """End the VM, if there is one, and forget its configuration."""
        self.call("PUT", "vm.delete")

    def power_button(self) -> None:
        """Ask the guest to shut down."""
        self.call("PUT", "vm.power-button")

    def nmi(self) -> None:
        """An NMI to each vCPU."""
        self.call("PUT", "vm.nmi")

    def counters(self) -> dict[str, dict[str, int]]:
        """What the devices have counted, by their names."""
        return _object(self.call("GET", "vm.counters"))

    def coredump(self, path: str | os.PathLike[str]) -> None:
        """Write a core of the VM to a new file of the VMM's host; returns once it is written."""
        body = {"destination_url": f"file://{os.path.abspath(os.fspath(path))}"}
        self.call("PUT", "vm.coredump", body, patient=True)

    def cancel(self) -> None:
        """Give up the long operation that is under way, if there is one."""
        self.call("PUT", "vm.cancel")

    # -- how ---------------------------------------------------------------------------------------

    def call(self, method: str, name: str, body: Any = None, *, patient: bool = False) -> Any:
        """Make the call ``name``, also one that has no method here; returns the answer's body, or None.

        ``patient``: it may take longer than ``timeout``.
        """
        data = None if body is None else json.dumps(body).encode()
        connection = _Connection(self.path, None if patient else self.timeout)
        try:
            connection.request(method, ROOT + name, body=data)
            answer = connection.getresponse()
            content = answer.read()
        except TimeoutError:
            raise HostError(f"call {name} at", self.path, f"no answer in {self.timeout} s") from None
        except OSError as error:
            raise HostError(f"call {name} at", self.path, error) from error
        except http.client.HTTPException as error:
            raise RemoteProtocolError(f"what answers at {self.path} is not the API: {error!r}") from error
        finally:
            connection.close()
        decoded = _json(content, self.path)
        if answer.status not in SUCCESS:
            sentences = decoded if isinstance(decoded, list) else [] if decoded is None else [decoded]
            raise ApiError(answer.status, [str(each) for each in sentences])
        return decoded


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._seconds = timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)  # before the timeout: one that must not wait fails while others queue
        self.sock.settimeout(self._seconds)


def _json(content: bytes, path: str) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError as error:
        raise RemoteProtocolError(f"what answers at {path} is not the API: {error}") from error


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RemoteProtocolError(f"the API answers {body!r} instead of an object")
    return body


def _without_null(value: Any) -> Any:
    """``value`` without what is not set, so that a server need not know of it."""
    if isinstance(value, dict):
        return {name: _without_null(each) for name, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list) else value

"""vm.coredump, a long operation beside others: what is possible meanwhile, its progress, its end."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pileus.errors import HostError
from tests.unit.api.harness import Api, Client, FakeDump, FakeVm
from tests.unit.tiny import wait_until

CONFIG = {"payload": {"kernel": "/k"}}
BODY = {"destination_url": "file:///core"}


class Dump:
    """One that a client waits for, as it stands in the middle."""

    def __init__(self, api: Api, vm: FakeVm) -> None:
        self.answer: tuple[int, Any] | None = None
        self._client = api.client()
        vm.waits = True
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        wait_until(lambda: "operation" in api.client().get("vm.info")[1])
        self.file: FakeDump = vm.dumps["/core"]

    def end(self) -> tuple[int, Any]:
        self.file.go.set()
        return self.wait()

    def wait(self) -> tuple[int, Any]:
        self._thread.join(30)
        assert self.answer is not None
        return self.answer

    def _ask(self) -> None:
        self.answer = self._client.ask("PUT", "vm.coredump", BODY)


Begin = Callable[[], Dump]


@pytest.fixture
def begin(api: Api, client: Client, fake_vms: list[FakeVm]) -> Begin:
    assert client.put("vm.create", CONFIG) == 204
    assert client.put("vm.boot") == 204
    return lambda: Dump(api, fake_vms[-1])


def state(client: Client) -> str:
    return str(client.get("vm.info")[1]["state"])


def test_a_running_vm_is_paused_meanwhile(begin: Begin, client: Client, fake_vms: list[FakeVm]) -> None:
    dump = begin()
    assert fake_vms[0].paused
    assert client.get("vmm.ping")[0] == 200
    info = client.get("vm.info")[1]
    assert info["state"] == "Paused"
    assert info["operation"] == {"name": "coredump", "done": 10, "total": 100}
    assert client.get("vm.counters")[0] == 200
    assert dump.end() == (204, None)
    assert state(client) == "Running"
    assert "operation" not in client.get("vm.info")[1]
    assert not fake_vms[0].paused


def test_a_paused_vm_stays_paused(begin: Begin, client: Client) -> None:
    client.put("vm.pause")
    assert begin().end() == (204, None)
    assert state(client) == "Paused"


@pytest.mark.parametrize("name", ["resume", "boot", "coredump"])
def test_what_would_change_the_memory_has_to_wait(begin: Begin, client: Client, name: str) -> None:
    dump = begin()
    status, sentences = client.ask("PUT", f"vm.{name}", BODY)
    assert status == 409
    assert sentences[0].endswith("in the middle of a coredump: that has to end, or to be cancelled.")
    assert dump.end()[0] == 204


def test_it_can_be_cancelled(begin: Begin, client: Client) -> None:
    dump = begin()
    assert client.put("vm.cancel") == 204
    assert dump.wait() == (409, ["the coredump was cancelled."])
    assert state(client) == "Running"
    assert client.put("vm.cancel") == 204, "there is nothing to give up"


@pytest.mark.parametrize(
    ("name", "after"), [("shutdown", "Shutdown"), ("reboot", "Running"), ("delete", None)]
)
def test_the_end_of_the_vm_is_its_end(begin: Begin, client: Client, name: str, after: str | None) -> None:
    dump = begin()
    assert client.put(f"vm.{name}") == 204
    assert dump.wait() == (409, ["the coredump was cancelled."])
    status, info = client.get("vm.info")
    assert (status == 404) if after is None else (info["state"] == after and "operation" not in info)


def test_the_end_of_the_vmm_is_its_end(begin: Begin, client: Client) -> None:
    dump = begin()
    assert client.put("vmm.shutdown") == 204
    assert dump.wait() == (409, ["the coredump was cancelled."])


def test_one_that_fails_lets_the_vm_go_on(begin: Begin, client: Client) -> None:
    dump = begin()
    dump.file.error = HostError("write", "/core", "no room")
    assert dump.end() == (500, ["cannot write /core: no room."])
    assert state(client) == "Running"


@pytest.mark.parametrize(
    "url", ["/core", "file://core", "file:///", "http:///core", "", 3, None, "file:///a\0b", "file://x/y"]
)
def test_another_url_is_refused(begin: Begin, client: Client, url: object) -> None:
    status, sentences = client.ask("PUT", "vm.coredump", {"destination_url": url})
    assert status == 400
    assert sentences[0].startswith("destination_url ")
    assert state(client) == "Running"


def test_there_has_to_be_a_vm_that_is_on(client: Client) -> None:
    assert client.ask("PUT", "vm.coredump", BODY)[0] == 404
    client.put("vm.create", CONFIG)
    assert client.ask("PUT", "vm.coredump", BODY)[0] == 409
    assert client.put("vm.cancel") == 409

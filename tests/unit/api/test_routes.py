"""Every call in every state, with VMs that take nothing of the host."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pileus.api.routes import ROUTES
from pileus.errors import ConfigError, HostError, KvmError
from pileus.vm import builder
from pileus.vm.vcpu import CRASH, FAILURE, POWER_OFF, RESET, Event
from pileus.vmm.lifecycle import CREATED, LIFE, NONE, PAUSED, RUNNING, SHUTDOWN
from tests.unit.api.harness import Api, Client, FakeVm

KERNEL = {"payload": {"kernel": "/k"}}
EVENTS = {  # call -> what the table of the life cycle calls it
    "vm.create": "create",
    "vm.delete": "delete",
    "vm.boot": "boot",
    "vm.pause": "pause",
    "vm.resume": "resume",
    "vm.shutdown": "shutdown",
    "vm.reboot": "reboot",
    "vm.nmi": "send an NMI to",
    "vm.power-button": "press the power button of",
    "vm.counters": "read the counters of",
}
WAYS = {  # state -> the calls that lead there from the beginning
    NONE: [],
    CREATED: ["vm.create"],
    RUNNING: ["vm.create", "vm.boot"],
    PAUSED: ["vm.create", "vm.boot", "vm.pause"],
    SHUTDOWN: ["vm.create", "vm.boot", "vm.shutdown"],
}


def call(client: Client, name: str) -> tuple[int, Any]:
    method = {route.name: route.method for route in ROUTES}[name]
    return client.ask(method, name, KERNEL if name == "vm.create" else None)


def state(client: Client) -> str:
    status, body = client.get("vm.info")
    assert status == (404 if body[0:1] else 200) if isinstance(body, list) else status == 200
    return NONE if isinstance(body, list) else str(body["state"])


def expected(before: str, name: str) -> tuple[int, str]:
    """Status of the call ``name`` and the state after it."""
    after = LIFE[before].get(EVENTS[name])
    if after is None:
        return 404 if before == NONE else 409, before
    return 200 if name == "vm.counters" else 204, after


@pytest.mark.parametrize("before", WAYS)
@pytest.mark.parametrize("name", EVENTS)
def test_each_call_in_each_state(client: Client, before: str, name: str) -> None:
    for step in WAYS[before]:
        assert call(client, step)[0] == 204
    status, after = expected(before, name)
    answer, body = call(client, name)
    assert answer == status, body
    assert state(client) == after
    if status >= 400:
        assert isinstance(body, list)
        assert len(body) == 1
        assert f"a VM that is {before}: it has to be" in body[0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from([route.name for route in ROUTES if route.name in EVENTS]), max_size=25))
def test_any_sequence_of_calls_keeps_to_the_table(
    client: Client, fake_vms: list[FakeVm], names: list[str]
) -> None:
    assert call(client, "vm.delete")[0] == 204
    before = NONE
    for name in names:
        status, before = expected(before, name)
        assert call(client, name)[0] == status
        assert state(client) == before
        assert sum(vm.started for vm in fake_vms) == (before in (RUNNING, PAUSED))
        if before in (RUNNING, PAUSED):
            assert fake_vms[-1].paused == (before == PAUSED)


def test_info_has_the_configuration_of_both_generations(client: Client) -> None:
    assert (
        client.put(
            "vm.create", {"kernel": {"path": "/k"}, "cmdline": {"args": "a"}, "memory": {"size": 1 << 30}}
        )
        == 204
    )
    status, info = client.get("vm.info")
    assert (status, info["state"], info["memory_actual_size"]) == (200, "Created", 1 << 30)
    assert info["config"]["kernel"]["path"] == info["config"]["payload"]["kernel"] == "/k"
    assert client.put("vm.delete") == 204
    assert client.put("vm.create", info["config"]) == 204, "what was told can be given back"
    assert client.get("vm.info") == (200, info)


def test_a_vm_without_a_kernel_can_be_made_but_not_booted(client: Client) -> None:
    assert client.put("vm.create", {}) == 204
    status, body = client.ask("PUT", "vm.boot")
    assert (status, body) == (400, ["--kernel is missing: a VM needs one to boot."])
    assert state(client) == CREATED


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a key twice": b'{"pci": true, "pci": true}',
    "NaN": b'{"pci": NaN}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"cpus":' * 50_000,
    "no text": b'{"payload": {"kernel": "\xff"}}',
    "long number": b'{"memory": {"size": ' + b"9" * 10_000 + b"}}",
    "huge number": b'{"memory": {"size": 1e999}}',
    "rules across fields": b'{"cpus": {"boot_vcpus": 2, "max_vcpus": 1}}',
    "half a character": rb'{"\ud800": 1}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_wrong_changes_nothing(client: Client, body: bytes) -> None:
    status, answer = client.ask("PUT", "vm.create", body)
    assert status == 400
    assert len(answer) == 1
    assert len(answer[0]) < 500
    assert state(client) == NONE


def test_what_is_nowhere_is_404_and_another_method_405(client: Client) -> None:
    for name in ("", "vm.infos", "vm.info/", "vm.info?a=b", "../vm.info", "vm.%69nfo"):
        assert client.get(name)[0] == 404
    for method in ("PUT", "POST", "DELETE", "OPTIONS", "PATCH", "QUERY"):
        client.request(method, "/api/v1/vm.info")
        answer = client.getresponse()
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")
        assert answer.read()
    client.request("HEAD", "/api/v1/vm.info")
    assert client.getresponse().read() == b""
    assert client.get("vmm.ping")[0] == 200


def test_the_whole_url_is_as_good_as_the_path(client: Client) -> None:
    client.request("GET", "http://localhost/api/v1/vmm.ping")
    answer = client.getresponse()
    assert answer.status == 200
    assert b"pid" in answer.read()


ERRORS = [
    (ConfigError("--kernel", "/k", "No such file"), 400, ["--kernel /k: No such file."]),
    (HostError("open", "/dev/x", OSError(2, "")), 500, ["cannot open /dev/x: No such file or directory."]),
    (KvmError("KVM_RUN", 14), 500, ["cannot use /dev/kvm: KVM_RUN failed: Bad address."]),
    (
        ZeroDivisionError("of ours"),
        500,
        ["There is a bug in pileus, and its log has more: ZeroDivisionError('of ours')."],
    ),
]


@pytest.mark.parametrize(("error", "status", "sentences"), ERRORS)
def test_a_boot_that_fails_is_told_and_leaves_the_vm_as_it_was(
    client: Client, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, sentences: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    client.put("vm.create", KERNEL)
    with monkeypatch.context() as broken:
        broken.setattr(builder, "build", fail)
        assert client.ask("PUT", "vm.boot") == (status, sentences)
        assert state(client) == CREATED
    assert client.put("vm.boot") == 204
    with monkeypatch.context() as broken:
        broken.setattr(builder, "build", fail)
        assert client.ask("PUT", "vm.reboot") == (status, sentences)
    assert state(client) == SHUTDOWN, "the old VM is gone by then"
    assert client.put("vm.boot") == 204


def test_causes_follow_outermost_first(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise HostError("read", "/x")
        except HostError as error:
            raise ConfigError("--a", "b", "c") from error

    monkeypatch.setattr(builder, "build", fail)
    client.put("vm.create", KERNEL)
    assert client.ask("PUT", "vm.boot") == (400, ["--a b: c.", "cannot read /x."])


def test_a_call_that_takes_long_keeps_nobody_from_asking(
    api: Api, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others that change the VM wait for their turn."""
    going_on = threading.Event()

    def slow(*_: object, **__: object) -> FakeVm:
        assert going_on.wait(20)
        return FakeVm()

    monkeypatch.setattr(builder, "build", slow)
    assert client.put("vm.create", KERNEL) == 204
    statuses: list[int] = []
    boot = threading.Thread(target=lambda: statuses.append(api.client().put("vm.boot")))
    pause = threading.Thread(target=lambda: statuses.append(api.client().put("vm.pause")))
    boot.start()
    time.sleep(0.1)
    pause.start()
    for _ in range(20):
        assert client.get("vmm.ping")[0] == 200
        assert state(client) == CREATED
    assert statuses == []
    going_on.set()
    boot.join()
    pause.join()
    assert statuses == [204, 204]
    assert state(client) == PAUSED


def test_the_guest_ends_the_vm_but_not_a_process_that_serves_the_api(
    api: Api, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Any] = []

    def build(
        _config: object, _kvm: object, _console: object, report: Any, *_: object, **__: object
    ) -> FakeVm:
        reports.append(report)
        return FakeVm()

    def wait_for(wanted: str) -> None:
        deadline = time.monotonic() + 20
        while state(client) != wanted:
            assert time.monotonic() < deadline

    monkeypatch.setattr(builder, "build", build)
    client.put("vm.create", KERNEL)
    for kind in (POWER_OFF, FAILURE):
        assert client.put("vm.boot") == 204
        reports[-1](Event(kind, "vCPU 0"))
        wait_for(SHUTDOWN)
    assert client.put("vm.boot") == 204
    for kind in (RESET, CRASH):
        count = len(reports)
        reports[-1](Event(kind, "vCPU 0"))
        while kind == RESET and len(reports) == count:
            pass
        wait_for(RUNNING)

    def fail(*_: object, **__: object) -> None:
        raise ConfigError("--kernel", "/k", "No such file")

    monkeypatch.setattr(builder, "build", fail)
    reports[-1](Event(RESET, "vCPU 0"))
    wait_for(SHUTDOWN)


@pytest.mark.parametrize("before", WAYS)
def test_vmm_shutdown_is_answered_and_ends_the_process(
    tmp_path: Path, fake_vms: list[FakeVm], before: str
) -> None:
    with Api(tmp_path / "api") as api:
        client = api.client()
        for step in WAYS[before]:
            call(client, step)
        assert client.put("vmm.shutdown") == 204
        api.join()
    assert (api.status, api.error) == (0, None)
    assert not any(vm.started for vm in fake_vms)

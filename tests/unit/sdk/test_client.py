"""The client, at a VMM that serves its API in this process."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pileus
from pileus.api.routes import ROUTES
from pileus.config.model import CpusConfig, DiskConfig, PayloadConfig, VmConfig
from pileus.errors import ApiError, HostError, RemoteProtocolError
from pileus.sdk.client import Client, Operation
from tests.unit.api.harness import Api, FakeVm
from tests.unit.tiny import wait_until

CONFIG = VmConfig(payload=PayloadConfig(kernel="/k"), cpus=CpusConfig(boot=2), disks=[DiskConfig(path="/d")])
LIFE = {
    "boot": "Running",
    "pause": "Paused",
    "resume": "Running",
    "reboot": "Running",
    "power_button": "Running",
    "nmi": "Running",
    "shutdown": "Shutdown",
}


@pytest.fixture
def vmm(api: Api) -> Client:
    return Client(api.path)


def test_a_life_by_methods(vmm: Client) -> None:
    vmm.create(CONFIG)
    assert vmm.info().state == "Created"
    for name, state in LIFE.items():
        getattr(vmm, name)()
        assert vmm.info().state == state
    vmm.boot()
    assert vmm.counters() == {"_net0": {"rx_bytes": 1}}
    vmm.delete()
    with pytest.raises(ApiError) as caught:
        vmm.info()
    assert caught.value.status == 404
    assert caught.value.sentences == [f"{caught.value}"]


def test_a_core_is_written_and_its_progress_told(vmm: Client, fake_vms: list[FakeVm], tmp_path: Path) -> None:
    vmm.create(CONFIG)
    vmm.boot()
    assert vmm.info().operation is None
    fake_vms[0].waits = True
    hasty = Client(vmm.path, timeout=0.2)
    failures: list[BaseException] = []

    def dump() -> None:
        try:
            hasty.coredump(tmp_path / "core")
        except BaseException as error:
            failures.append(error)

    for ending in ("go", "cancel"):
        thread = threading.Thread(target=dump)
        thread.start()
        wait_until(lambda: vmm.info().operation == Operation("coredump", 10, 100))
        time.sleep(0.3)  # longer than this client waits for other calls
        if ending == "go":
            fake_vms[0].dumps[str(tmp_path / "core")].go.set()
        else:
            vmm.cancel()
        thread.join()
        assert vmm.info().operation is None
    (cancelled,) = failures
    assert isinstance(cancelled, ApiError)
    assert str(cancelled) == "the coredump was cancelled."


def test_each_call_of_the_api_has_a_method(vmm: Client) -> None:
    methods = {name.replace("_", "-") for name in vars(Client) if not name.startswith("_")}
    calls = {route.name.removesuffix(".json").rpartition(".")[2] for route in ROUTES} - {"shutdown"}
    assert calls | {"shutdown", "shutdown-vmm"} <= methods


def test_the_ping_and_the_description(vmm: Client) -> None:
    ping = vmm.ping()
    assert ping.pid == os.getpid()
    assert "kvm" in ping.features
    assert vmm.openapi()["openapi"].startswith("3.1")


def test_what_was_created_is_told(vmm: Client) -> None:
    vmm.create(CONFIG)
    info = vmm.info()
    assert info.config["cpus"]["boot_vcpus"] == 2
    assert info.config["disks"][0]["path"] == "/d"
    assert info.memory_actual_size == 512 << 20


def test_json_is_taken_as_well(vmm: Client) -> None:
    vmm.create({"kernel": {"path": "/k"}, "cpus": {"cpu_count": 3}})
    assert vmm.info().config["cpus"]["boot_vcpus"] == 3


def test_what_is_refused_says_why_and_changes_nothing(vmm: Client) -> None:
    with pytest.raises(ApiError, match=r"cpus\.boot_vcpus") as caught:
        vmm.create({"payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": 0}})
    assert caught.value.status == 400
    with pytest.raises(ApiError, match="it has to be created first"):
        vmm.info()


def test_threads_share_a_client(vmm: Client) -> None:
    failures: list[BaseException] = []

    def ping() -> None:
        try:
            for _ in range(20):
                vmm.ping()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ping) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_vmm_that_ends_is_gone(api: Api, vmm: Client) -> None:
    vmm.shutdown_vmm()
    api.join()
    with pytest.raises(HostError, match=f"cannot call vmm.ping at {api.path}: No such file"):
        vmm.ping()


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        yield listener


def test_who_never_answers_is_left(tmp_path: Path, stranger: socket.socket) -> None:
    with pytest.raises(HostError, match=r"no answer in 0\.05 s"):
        Client(tmp_path / "s", timeout=0.05).ping()


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\nnull",
        b"",
    ],
    ids=["no HTTP", "no JSON", "no object", "nothing"],
)
def test_what_is_no_vmm_is_told(tmp_path: Path, stranger: socket.socket, answer: bytes) -> None:
    def reply() -> None:
        with stranger.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(answer)

    thread = threading.Thread(target=reply)
    thread.start()
    with pytest.raises((RemoteProtocolError, HostError), match=r"API|cannot call"):
        Client(tmp_path / "s", timeout=30).ping()
    thread.join()


def test_the_package_has_the_names_and_imports_them_late() -> None:
    script = "import sys, pileus; print(sum(n.startswith('pileus') for n in sys.modules), *dir(pileus))"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    ).stdout.split()
    assert told[0] == "1"
    public = {name for name in told[1:] if not name.startswith("_")}
    assert public - {"TYPE_CHECKING"} == {"ApiError", "Client", "PileusError", "VirtualMachine"}
    assert pileus.Client is Client
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pileus.Nothing  # type: ignore[attr-defined]

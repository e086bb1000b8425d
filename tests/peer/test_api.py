"""A pileus process and its API: by curl, by pileus-remote, and by fifty clients at once."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pileus.errors import ApiError, HostError
from pileus.kvm.probe import OVERRIDE
from pileus.sdk.client import Client
from tests.unit import tiny

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
ROOT = Path(__file__).parents[2]
CLIENTS = 50
SECONDS = float(os.environ.get("PILEUS_CLIENTS_SECONDS", "15"))  # a minute, where there is time
REFUSALS = (404, 409)  # of a state that does not allow it


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """The socket of a pileus process; it ends with status 0 and leaves nothing there."""
    path = tmp_path / "api"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "bin" / "pileus"), "--api-socket", str(path)],
        env=os.environ | {OVERRIDE: "1", "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.DEVNULL,
    )
    tiny.wait_until(path.exists)
    yield path
    with suppress(HostError):  # it was ended by the test
        Client(path).shutdown_vmm()
    assert process.wait(60) == 0
    assert not path.exists()


def config(folder: Path) -> dict[str, Any]:
    (folder / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    return {
        "payload": {"kernel": str(folder / "kernel")},
        "memory": {"size": 16 << 20},
        "console": {"mode": "Off"},
        "vsock": {"cid": 3, "socket": str(folder / "vsock")},
    }


def curl(path: Path, method: str, name: str, body: object = None) -> tuple[int, Any]:
    words = ["curl", "-sS", "--unix-socket", str(path), "-X", method, f"http://localhost/api/v1/{name}"]
    words += ["-w", "\n%{http_code}"]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    content, _, status = told.rpartition("\n")
    return int(status), json.loads(content) if content else None


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_leads_a_vm_through_its_life(path: Path, tmp_path: Path) -> None:
    assert curl(path, "GET", "vmm.ping")[0] == 200
    assert curl(path, "GET", "vm.info")[0] == 404
    for _ in range(2):
        assert curl(path, "PUT", "vm.create", config(tmp_path)) == (204, None)
        assert curl(path, "PUT", "vm.create", config(tmp_path))[0] == 409
        steps = {"boot": "Running", "pause": "Paused", "resume": "Running", "reboot": "Running"}
        for name, state in {**steps, "shutdown": "Shutdown"}.items():
            assert curl(path, "PUT", f"vm.{name}") == (204, None)
            status, info = curl(path, "GET", "vm.info")
            assert (status, info["state"]) == (200, state)
        assert curl(path, "PUT", "vm.delete") == (204, None)
        assert not (tmp_path / "vsock").exists()
    status, sentences = curl(path, "PUT", "vm.create", {"kernel": 3})
    assert status == 400
    assert sentences == ["kernel 3: it takes an object."]
    assert curl(path, "PUT", "vmm.shutdown") == (204, None)


def test_pileus_remote_leads_a_vm_through_its_life(path: Path, tmp_path: Path) -> None:
    def remote(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "bin" / "pileus-remote"), "--api-socket", str(path), *words],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        return done.stderr if status else done.stdout

    (tmp_path / "config").write_text(json.dumps(config(tmp_path)))
    remote("create", str(tmp_path / "config"))
    for verb in ("boot", "pause", "resume", "reboot"):
        assert remote(verb) == ""
    assert json.loads(remote("info"))["state"] == "Running"
    assert "vcpus" in json.loads(remote("counters"))
    assert remote("coredump", str(tmp_path / "core")) == ""
    assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"
    told = remote("coredump", f"file://{tmp_path}/core", status=1)
    assert told == (
        f"pileus-remote: destination_url {tmp_path}/core: File exists; a new file that can be written is"
        " needed. [Errno 17] File exists: " + repr(f"{tmp_path}/core") + ".\n"
    )
    remote("cancel")
    remote("delete")
    remote("shutdown-vmm")


def test_fifty_clients_at_once(path: Path, tmp_path: Path) -> None:
    """Each asks for anything at any time; all are answered, and what is answered makes sense."""
    body, ends = config(tmp_path), time.monotonic() + SECONDS
    waits: list[float] = []
    failures: list[object] = []

    def lead(number: int) -> None:
        client, chance = Client(path, timeout=60), random.Random(number)
        calls = {
            "create": lambda: client.create(body),
            "info": client.info,
            "ping": client.ping,
            "counters": client.counters,
            **{name: getattr(client, name) for name in ("boot", "pause", "resume", "reboot", "shutdown")},
            "delete": client.delete,
        }
        while time.monotonic() < ends:
            name = chance.choice([*calls, "ping", "info", "create", "boot"])
            began = time.monotonic()
            try:
                calls[name]()
            except ApiError as error:
                if error.status not in REFUSALS:
                    failures.append((name, error))
            except Exception as error:
                failures.append((name, error))
            if name == "ping":
                waits.append(time.monotonic() - began)

    threads = [threading.Thread(target=lead, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    print(f"{len(waits)} pings, the slowest took {1000 * max(waits):.0f} ms")
    Client(path).delete()

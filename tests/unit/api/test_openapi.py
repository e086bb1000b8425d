"""The description of the API, judged by those who know descriptions, and the server by it."""

import http.client
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from pileus.api import generations
from pileus.api import server as module
from pileus.api.openapi import document
from pileus.api.routes import ROUTES
from pileus.config.model import VmConfig
from tests.unit.api.harness import Api, Client, FakeVm

CASES = int(os.environ.get("PILEUS_CASES", "150"))  # of each call; thousands take minutes


def test_the_description_is_valid() -> None:
    validate(document(ROUTES))


def test_it_is_served(client: Client) -> None:
    assert client.get("openapi.json") == (200, document(ROUTES))


def test_what_is_told_is_what_the_description_says() -> None:
    schemas = {"$ref": "#/components/schemas/VmConfig", "components": {"schemas": generations.schemas()}}
    OAS31Validator(schemas).validate(generations.encode(VmConfig()))


@pytest.fixture
def port(tmp_path: Path, fake_vms: list[FakeVm], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The API by TCP, which is all that schemathesis knows."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=50)
    listener.setblocking(False)
    monkeypatch.setattr(module, "_listen", lambda _: (None, listener))
    api = Api(tmp_path / "api")
    api._thread.start()
    yield listener.getsockname()[1]
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"PUT /api/v1/vmm.shutdown HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 204"
    api.join()


def lead_lives(port: int, ended: threading.Event) -> None:
    """Have VMs come and go, so that calls meet each state."""
    calls = random.Random(1)
    names = ["create", "boot", "pause", "resume", "shutdown", "reboot", "delete", "delete"]
    while not ended.wait(0.005):
        client = http.client.HTTPConnection("127.0.0.1", port)
        client.request("PUT", f"/api/v1/vm.{calls.choice(names)}", body=b'{"payload": {"kernel": "/k"}}')
        client.getresponse().read()
        client.close()


def test_schemathesis_finds_no_answer_that_is_not_described(port: int, tmp_path: Path) -> None:
    ended = threading.Event()
    lives = threading.Thread(target=lead_lives, args=(port, ended))
    lives.start()
    try:
        done = schemathesis(port, tmp_path)
    finally:
        ended.set()
        lives.join()
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert generated is not None
    assert int(generated[1]) >= CASES


def schemathesis(port: int, folder: Path) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{port}/api/v1"
    words = [
        *("run", f"{url}/openapi.json", "--url", url, "--exclude-operation-id", "vmm.shutdown"),
        *("--max-examples", str(CASES), "--seed", "1", "--phases", "examples,coverage,fuzzing"),
        *("--exclude-checks", "positive_data_acceptance"),  # rules across fields are no part of a schema
        *("--generation-database", "none", "--no-color"),
    ]
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )

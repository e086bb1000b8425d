"""A VMM that serves its API: with real VMs, or with such as take nothing of the host."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.console import Console
from pileus.kvm.probe import OVERRIDE
from pileus.vm import builder
from pileus.vmm import vmm as module
from tests.unit.api.harness import Api, Client, FakeVm


class FakeKvm:
    def close(self) -> None:
        pass


@pytest.fixture
def fake_vms(monkeypatch: pytest.MonkeyPatch) -> list[FakeVm]:
    """No host is needed for VMs from now on; those made so far."""
    made: list[FakeVm] = []

    def build(*_: Any, **__: Any) -> FakeVm:
        made.append(FakeVm())
        return made[-1]

    monkeypatch.setattr(module, "check_host", lambda: None)
    monkeypatch.setattr(module, "Kvm", FakeKvm)
    monkeypatch.setattr(module, "open_console", lambda *_, name, **__: Console(name))
    monkeypatch.setattr(builder, "build", build)
    return made


@pytest.fixture
def api(tmp_path: Path, fake_vms: list[FakeVm]) -> Iterator[Api]:
    with Api(tmp_path / "api") as api:
        yield api


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    client = api.client()
    yield client
    client.close()


@pytest.fixture
def real_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """For VMs of a few bytes on any /dev/kvm."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
    monkeypatch.setenv(OVERRIDE, "1")
    with Api(tmp_path / "api") as api:
        yield api

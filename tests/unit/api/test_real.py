"""VMs of a few bytes, led through their lives by the API."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pileus.kvm.probe import OVERRIDE
from tests.unit import tiny
from tests.unit.api.harness import Api, Client

COUNT_ON = bytes.fromhex("ff0500002000 ebf8")  # inc dword [COUNTER]; jmp to it
HALT = bytes.fromhex("f4 ebfd")
STATES = {"vm.boot": "Running", "vm.pause": "Paused", "vm.resume": "Running", "vm.shutdown": "Shutdown"}


def body(folder: Path, code: bytes, cpus: int = 1) -> dict[str, Any]:
    """A VM of ``code``, its RAM and its serial port in files of ``folder``."""
    (folder / "kernel").write_bytes(tiny.elf(code))
    (folder / "ram").touch()
    return {
        "kernel": {"path": str(folder / "kernel")},
        "cmdline": {"args": ""},
        "cpus": {"cpu_count": cpus},
        "memory": {"size": 16 << 20, "file": str(folder / "ram")},
        "console": {"mode": "Off"},
        "serial": {"mode": "File", "file": str(folder / "serial")},
    }


def counter(folder: Path) -> int:
    with (folder / "ram").open("rb") as ram:
        ram.seek(tiny.COUNTER)
        return int.from_bytes(ram.read(4), "little")


def put(client: Client, *names: str) -> None:
    for name in names:
        assert client.ask("PUT", name) == (204, None), name
        if name in STATES:
            assert client.get("vm.info")[1]["state"] == STATES[name]


def wait_for_state(client: Client, state: str) -> None:
    tiny.wait_until(lambda: client.get("vm.info")[1]["state"] == state)


def cpu_seconds() -> float:
    return sum(os.times()[:2])


def test_a_whole_life_and_another_one(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    for _ in range(2):
        assert client.put("vm.create", body(tmp_path, tiny.SAY_A + COUNT_ON)) == 204
        put(client, "vm.boot")
        tiny.wait_until(lambda: counter(tmp_path) > 0)
        put(client, "vm.pause", "vm.resume", "vm.reboot", "vm.shutdown", "vm.boot")
        tiny.wait_until(lambda: bool(client.get("vm.counters")[1]["vcpus"]))
        put(client, "vm.delete")
        assert client.get("vm.info")[0] == 404
        assert (tmp_path / "serial").read_bytes() in (b"", b"A")


@pytest.mark.parametrize("cpus", [1, 4])
def test_a_paused_guest_does_nothing_and_then_goes_on(real_api: Api, tmp_path: Path, cpus: int) -> None:
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, COUNT_ON, cpus)) == 204
    put(client, "vm.boot")
    for _ in range(5):
        before = counter(tmp_path)
        tiny.wait_until(lambda before=before: counter(tmp_path) != before)  # type: ignore[misc]
        put(client, "vm.pause")
        before, used = counter(tmp_path), cpu_seconds()
        time.sleep(0.2)
        assert counter(tmp_path) == before
        assert cpu_seconds() - used < 0.1
        put(client, "vm.resume")
    tiny.wait_until(lambda: counter(tmp_path) != before)


def test_a_guest_that_sleeps_can_be_paused(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, HALT, 4)) == 204
    put(client, "vm.boot", "vm.pause", "vm.resume", "vm.pause", "vm.boot", "vm.delete")


@pytest.mark.parametrize("name", ["vm.shutdown", "vm.delete", "vm.reboot", "vmm.shutdown"])
def test_a_paused_vm_can_be_ended(real_api: Api, tmp_path: Path, name: str) -> None:
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, COUNT_ON, 2)) == 204
    put(client, "vm.boot", "vm.pause", name)
    if name == "vm.reboot":
        wait_for_state(client, "Running")


def test_a_thousand_pauses(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, COUNT_ON, 2)) == 204
    put(client, "vm.boot")
    for _ in range(1000):
        assert client.put("vm.pause") == 204
        assert client.put("vm.resume") == 204
    before = counter(tmp_path)
    tiny.wait_until(lambda: counter(tmp_path) != before)


def test_a_guest_that_powers_off_leaves_the_process(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, tiny.SAY_A + tiny.POWER_OFF)) == 204
    for _ in range(3):
        assert client.put("vm.boot") == 204
        wait_for_state(client, "Shutdown")
        assert (tmp_path / "serial").read_bytes() == b"A"
    put(client, "vm.delete")


def test_a_vm_of_the_command_line_ends_the_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDE, "1")
    with Api(tmp_path / "api", tiny.config(tmp_path, tiny.SAY_A + tiny.POWER_OFF)) as api:
        api.join()
    assert (api.status, api.error) == (0, None)


def test_a_vm_of_the_command_line_can_make_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDE, "1")
    with Api(tmp_path / "api", tiny.config(tmp_path, tiny.SPIN)) as api:
        client = api.client()
        wait_for_state(client, "Running")
        put(client, "vm.pause", "vm.delete")
        assert client.put("vm.create", body(tmp_path, tiny.POWER_OFF)) == 204
        assert client.put("vm.boot") == 204
        wait_for_state(client, "Shutdown")


def test_the_pty_of_a_terminal_is_told_while_there_is_one(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    config = body(tmp_path, tiny.SPIN) | {"serial": {"mode": "Pty"}}
    assert client.put("vm.create", config) == 204

    def serial() -> Any:
        return client.get("vm.info")[1]["config"]["serial"]["file"]

    assert serial() is None
    put(client, "vm.boot")
    assert os.path.exists(serial())
    put(client, "vm.shutdown")
    assert serial() is None


def test_a_boot_that_fails_leaves_nothing_and_can_be_tried_again(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    config = body(tmp_path, tiny.SPIN)
    assert client.put("vm.create", config) == 204
    client.put("vm.boot")
    client.put("vm.shutdown")
    before = tiny.held()[:2]
    kernel = (tmp_path / "kernel").read_bytes()
    for damaged in (b"", b"\x7fELF", kernel[:70], kernel[:0x805]):
        (tmp_path / "kernel").write_bytes(damaged)
        status, sentences = client.ask("PUT", "vm.boot")
        assert status == 400
        assert sentences[0].startswith(f"--kernel {tmp_path}")
        assert tiny.held()[:2] == before
    (tmp_path / "kernel").write_bytes(kernel)
    put(client, "vm.boot")


def test_a_hundred_vms_one_after_the_other_leave_nothing(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    chance = random.Random(1)
    held = []
    for count in range(100):
        assert client.put("vm.create", body(tmp_path, COUNT_ON, chance.randint(1, 3))) == 204
        put(
            client,
            "vm.boot",
            *chance.choice([(), ("vm.pause",), ("vm.shutdown",), ("vm.reboot",)]),
            "vm.delete",
        )
        if count >= 10:
            held.append(tiny.held())
    assert len({each[:2] for each in held}) == 1
    assert held[-1].pages <= held[0].pages + 2


def test_the_power_button_reaches_the_guest(real_api: Api, tmp_path: Path) -> None:
    """One that looks at the port of events all the time, and powers off."""
    wait = bytes.fromhex("66ba0605 ec a801 74fb")  # in al, 0x506; test al, 1; jz to the in
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, wait + tiny.POWER_OFF)) == 204
    put(client, "vm.boot")
    assert client.put("vm.power-button") == 204
    wait_for_state(client, "Shutdown")


def test_an_nmi_reaches_a_guest_without_a_handler_as_a_triple_fault(real_api: Api, tmp_path: Path) -> None:
    client = real_api.client()
    assert client.put("vm.create", body(tmp_path, COUNT_ON)) == 204
    put(client, "vm.boot")
    assert client.put("vm.nmi") == 204
    wait_for_state(client, "Running")
    put(client, "vm.pause", "vm.delete")

"""The event monitor: its form, its reader that comes late or never, and what a VM's life says to it."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.config.model import EventMonitorConfig, VmConfig, VmmConfig
from pileus.errors import ConfigError, HostError
from pileus.kvm.probe import OVERRIDE
from pileus.vmm import events as module
from pileus.vmm.events import EventMonitor
from pileus.vmm.vmm import Vmm, run
from tests.unit import tiny
from tests.unit.api.conftest import fake_vms
from tests.unit.api.harness import FakeVm
from tests.unit.vmm.test_life import happen

__all__ = ["fake_vms"]


def told(text: str) -> list[dict[str, Any]]:
    """The events in ``text``; each ends in an empty line."""
    assert not text or text.endswith("}\n\n")
    return [json.loads(each) for each in text.split("\n\n") if each]


def names(text: str) -> list[str]:
    return [f"{each['source']} {each['event']}" for each in told(text)]


@pytest.fixture
def pipe() -> Iterator[tuple[int, EventMonitor]]:
    reading, writing = os.pipe()
    monitor = EventMonitor(EventMonitorConfig(fd=writing))
    yield reading, monitor
    monitor.close()
    os.close(reading)


def test_an_event_is_json_as_clients_know_it(pipe: tuple[int, EventMonitor]) -> None:
    reading, monitor = pipe
    monitor("vm", "booted")
    text = os.read(reading, 4096).decode()
    (event,) = told(text)
    seconds, nanoseconds = event["timestamp"]["secs"], event["timestamp"]["nanos"]
    assert text == (
        f'{{\n  "timestamp": {{\n    "secs": {seconds},\n    "nanos": {nanoseconds}\n  }},\n'
        '  "source": "vm",\n  "event": "booted",\n  "properties": null\n}\n\n'
    )
    assert 0 <= nanoseconds < 1_000_000_000
    assert not os.get_inheritable(monitor._fd)


def test_time_goes_by_between_events(pipe: tuple[int, EventMonitor]) -> None:
    reading, monitor = pipe
    for _ in range(3):
        monitor("vm", "paused")
    stamps = [tuple(each["timestamp"].values()) for each in told(os.read(reading, 4096).decode())]
    assert stamps == sorted(stamps)


def test_a_reader_that_sleeps_holds_nobody_up_and_reads_whole_events(pipe: tuple[int, EventMonitor]) -> None:
    reading, monitor = pipe
    for _ in range(5000):  # more than any pipe holds
        monitor("vm", "paused", {"room": "x" * 50})
    os.set_blocking(reading, False)
    text = b""
    while True:
        try:
            text += os.read(reading, 1 << 20)
        except BlockingIOError:
            break
    monitor("vm", "resumed")
    text += os.read(reading, 1 << 20)
    seen = names(text.decode())
    assert 100 < len(seen) < 5000
    assert seen[-1] == "vm resumed"


def test_a_reader_that_is_gone_is_no_matter() -> None:
    reading, writing = os.pipe()
    monitor = EventMonitor(EventMonitorConfig(fd=writing))
    os.close(reading)
    monitor("vm", "paused")
    monitor.close()
    monitor.close()
    monitor("vm", "resumed")


def test_a_fifo_keeps_events_for_a_reader_that_comes_late(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    monitor = EventMonitor(EventMonitorConfig(path=str(tmp_path / "fifo")))
    monitor("vmm", "starting")
    with (tmp_path / "fifo").open() as reader:
        monitor("vmm", "shutdown")
        monitor.close()
        assert names(reader.read()) == ["vmm starting", "vmm shutdown"]


def test_a_file_is_emptied_first_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "events"
    for _ in range(2):
        monitor = EventMonitor(EventMonitorConfig(path=str(path)))
        monitor("vmm", "starting")
        monitor.close()
    assert names(path.read_text()) == ["vmm starting"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=f"cannot write events to {tmp_path}/no/x: No such file"):
        EventMonitor(EventMonitorConfig(path=f"{tmp_path}/no/x"))
    reading, writing = os.pipe()
    os.close(writing)
    for fd in (reading, writing, 999_999):
        with pytest.raises(ConfigError, match=r"--event-monitor fd .*an open descriptor to write to"):
            EventMonitor(EventMonitorConfig(fd=fd))
    os.close(reading)


def test_threads_do_not_mix_their_events(tmp_path: Path) -> None:
    path = tmp_path / "events"
    monitor = EventMonitor(EventMonitorConfig(path=str(path)))

    def tell(name: str) -> None:
        for _ in range(100):
            monitor("vm", name)

    threads = [threading.Thread(target=tell, args=(f"e{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monitor.close()
    assert sorted(names(path.read_text())) == sorted(f"vm e{index}" for index in range(4) for _ in range(100))


def test_a_guest_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST", 10)
    monitor = EventMonitor(EventMonitorConfig(path=str(tmp_path / "events")))
    for _ in range(100):
        monitor("virtio-device", "reset", {"id": "rng0"})
    monitor("vm", "paused")
    monitor.close()
    assert names((tmp_path / "events").read_text()) == ["virtio-device reset"] * 10 + ["vm paused"]


class Listener:
    """What a Vmm tells of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __call__(self, source: str, event: str, properties: object) -> None:
        self.heard.append(f"{source} {event}")

    def take(self) -> list[str]:
        heard, self.heard = self.heard, []
        return heard


def test_each_step_of_a_life_is_told(fake_vms: list[FakeVm]) -> None:
    listener = Listener()
    vmm = Vmm(listener)
    try:
        vmm.create(VmConfig())
        vmm._config.payload.kernel = "/k"  # type: ignore[union-attr]
        assert listener.take() == []
        steps = {
            "boot": ["booting", "booted"],
            "pause": ["pausing", "paused"],
            "resume": ["resuming", "resumed"],
            "reboot": ["rebooting", "rebooted"],
            "shutdown": ["shutdown"],
            "delete": ["deleted"],
        }
        for name, expected in steps.items():
            getattr(vmm, name)()
            assert listener.take() == [f"vm {event}" for event in expected]
        vmm.delete()
        assert listener.take() == []
        vmm.create(VmConfig())
        vmm._config.payload.kernel = "/k"  # type: ignore[union-attr]
        vmm.boot()
        listener.take()
        vmm.delete()
        assert listener.take() == ["vm shutdown", "vm deleted"]
    finally:
        vmm.close()


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
def test_what_a_guest_does_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "1")
    listener = Listener()
    vmm = Vmm(listener)
    try:
        vmm.create(tiny.config(tmp_path, tiny.SPIN))
        vmm.boot()
        for kind in ("crash", "crash", "reset"):
            happen(vmm, kind)
        vmm.loop.post(lambda: happen(vmm, "power off"))  # of the VM after the reset
        vmm.loop.run()
    finally:
        vmm.close()
    assert listener.take() == [
        *("vm booting", "vm booted", "guest panic", "vm rebooting", "vm rebooted"),
        "vm shutdown",
    ]


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
def test_a_whole_run_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "1")
    path = tmp_path / "events"
    config = VmmConfig(
        vm=tiny.config(tmp_path, tiny.POWER_OFF), event_monitor=EventMonitorConfig(path=str(path))
    )
    assert run(config) == 0
    assert names(path.read_text()) == [
        "vmm starting",
        "vm booting",
        "vm booted",
        "vm shutdown",
        "vmm shutdown",
    ]

"""pileus.Client leads a stock kernel and its shell through a life."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pileus import Client
from pileus.errors import ApiError
from tests.guest.guest import TIMEOUT, TRIXIE_PVH, Guest, NotSeenError

PAUSE = 2.0  # seconds, as in the reference
CONFIG = {
    "cpus": {"cpu_count": 4},
    "memory": {"size": 512 << 20},
    "serial": {"mode": "Tty"},
    "console": {"mode": "Off"},
}
Served = tuple[Guest, Client]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A pileus that waits for clients, and one of these."""
    if not TRIXIE_PVH.path.exists():
        pytest.skip("no kernel in .cache/guests: scripts/guests says why")
    path, events = tmp_path / "api", tmp_path / "events"
    options = ["--api-socket", str(path), "--event-monitor", f"path={events}"]
    with Guest(options, tmp_path / "log") as guest:
        until(path.exists)
        client = Client(path, timeout=TIMEOUT)
        yield guest, client
        client.shutdown_vmm()
        assert guest.wait() == 0
        assert not path.exists()


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        if time.monotonic() > deadline:
            raise NotSeenError("it never came")
        time.sleep(0.1)


def create(client: Client) -> None:
    client.create(
        {
            **CONFIG,
            "kernel": {"path": str(TRIXIE_PVH.path)},
            "initramfs": {"path": str(TRIXIE_PVH.initramfs)},
            "cmdline": {"args": "console=ttyS0 quiet panic=-1 pileus.do=shell"},
        }
    )


def test_the_client_creates_and_boots(served: Served) -> None:
    guest, client = served
    create(client)
    client.boot()
    guest.shell()
    assert guest.run("nproc") == "4"
    assert int(guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo")) > 450_000
    assert client.info().state == "Running"


def test_the_client_pauses_and_resumes(served: Served) -> None:
    guest, client = served
    create(client)
    client.boot()
    guest.shell()
    client.pause()
    guest.type("echo nobo''dy\n")
    time.sleep(PAUSE)
    assert "nobody" not in guest.output
    client.resume()
    guest.expect("nobody")
    guest.shell()
    assert guest.run("dmesg | grep -ci 'soft lockup'") == "0"


def test_another_vm_after_a_power_off(served: Served) -> None:
    guest, client = served
    for _ in range(2):
        create(client)
        client.boot()
        guest.shell()
        guest.type("poweroff -f\n")
        until(lambda: client.info().state == "Shutdown")
        client.delete()
        with pytest.raises(ApiError, match="not created"):
            client.info()


def test_a_core_of_a_kernel_is_written_while_it_waits(served: Served, tmp_path: Path) -> None:
    """drgn finds its way in it, by the note that Linux left at boot."""
    guest, client = served
    create(client)
    client.boot()
    guest.shell()
    release = guest.run("uname -r")
    client.coredump(tmp_path / "core")
    assert guest.run("echo still here") == "still here"
    drgn = pytest.importorskip("drgn")
    program = drgn.Program()
    program.set_core_dump(tmp_path / "core")
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert f"OSRELEASE={release}" in (tmp_path / "core").read_bytes()[: 1 << 16].decode(errors="replace")

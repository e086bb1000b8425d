"""Devices that a process of their own serves, started and supervised by us."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pileus import log
from pileus.cleanup import Cleanup
from pileus.config.model import DiskConfig, NetConfig, VmConfig
from pileus.errors import HostError
from pileus.loop import Loop
from pileus.testing import FakeDriver
from pileus.vhost_user.devices.device import VhostUserDevice
from pileus.vhost_user.offload import Child
from pileus.virtio import status
from pileus.vm.offloaded import Offloaded, disk_child, interface_child
from pileus.vm.vhost_user_devices import open_disk, open_net
from tests.unit.net.namespace import Namespace, packet_socket
from tests.unit.virtio.devices.disks import OK, SECTOR, Disk

from .commands import ROOT
from .serving import PATIENCE
from .test_backend import driving, until
from .test_backend_net import FRAME, send
from .writer import BLOCK, BLOCKS, Writer

QUEUES = 2


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(QUEUES * BLOCKS * BLOCK)
    return path


def disk(image: Path) -> Callable[[Loop], VhostUserDevice]:
    config = DiskConfig(path=str(image), image_type="raw", num_queues=QUEUES, offload=True, serial="number")
    return lambda loop: open_disk(config, 0, loop, disk_child(config, 0, loop))


def child(driver: FakeDriver) -> Child:
    assert isinstance(driver.device, VhostUserDevice)
    assert isinstance(driver.device._peer, Child)
    return driver.device._peer


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"), key=int)


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_disk_is_served_by_a_child_that_ends_with_it(image: Path) -> None:
    with driving(disk(image)) as driver:
        pid = child(driver).pid
        assert Disk(driver).write(3, b"x" * SECTOR) == OK
    assert gone(pid)
    assert image.read_bytes()[3 * SECTOR :][:SECTOR] == b"x" * SECTOR


def test_killing_the_child_ten_times_in_the_middle_of_writes_loses_nothing(image: Path) -> None:
    chance = random.Random(6)
    with driving(disk(image)) as driver:
        writer = Writer(driver, QUEUES)
        writer.start()
        for _ in range(10):
            time.sleep(chance.uniform(0.05, 0.3))
            pid = child(driver).pid
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: child(driver).pid not in (0, pid))  # type: ignore[misc]
        writer.finish()
        assert driver.status & status.NEEDS_RESET == 0


def test_an_interface_is_served_by_a_child(tmp_path: Path) -> None:
    with Namespace() as host:
        config = NetConfig(offload=True, num_queues=4, mac="2e:00:00:00:00:01")
        with driving(lambda loop: open_net(config, 0, loop, interface_child(config, 0, loop))) as driver:
            (name,) = set(host.links) - {"lo"}
            with packet_socket(name) as sock:
                assert send(driver, sock, FRAME) == FRAME
                os.kill(child(driver).pid, signal.SIGKILL)
                assert send(driver, sock, FRAME) == FRAME
        assert host.links == ["lo"]


def test_an_image_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"")
    loop = Loop()
    before = descriptors()
    with pytest.raises(HostError, match=r"cannot start pileus-blk: .*image.*a disk has at least one sector"):
        disk(path)(loop)
    assert descriptors() == before
    assert children() == []
    loop.close()


def test_children_begin_before_their_devices_and_end_without_them(image: Path) -> None:
    before = descriptors()
    config = VmConfig(disks=[DiskConfig(path=str(image), image_type="raw", offload=True)])
    loop, cleanup = Loop(), Cleanup()
    pid = Offloaded(config, loop, cleanup).disks[0].pid
    assert not gone(pid)
    cleanup.close()
    loop.close()
    assert gone(pid)
    assert descriptors() == before


def test_what_a_child_has_to_say_is_in_the_log_of_the_vmm(
    image: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "level", log.INFO)
    with driving(disk(image)):
        pass
    told = capfd.readouterr().err
    assert "_disk0: its process says: a front-end is here" in told


def test_a_child_has_its_socket_and_its_file_and_nothing_else_of_ours(image: Path) -> None:
    with driving(disk(image)) as driver:
        folder = f"/proc/{child(driver).pid}/fd"
        held = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
        files = {each for each in held if each.startswith("/") and "memfd:" not in each}
        assert files == {"/dev/null", str(image)}
        assert Path(f"/proc/{child(driver).pid}/environ").read_bytes() == b"LANG=C.UTF-8\0"


SCRIPT = """
import os, sys, time
from pileus.config.model import DiskConfig
from pileus.loop import Loop
from pileus.vm.offloaded import disk_child
from pileus.vm.vhost_user_devices import open_disk
config, loop = DiskConfig(path=sys.argv[1], image_type="raw", offload=True), Loop()
device = open_disk(config, 0, loop, disk_child(config, 0, loop))
print(device._peer.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_child_of_a_vmm_that_is_killed_ends(image: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(image)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.stdout, done.stderr
    until(lambda: gone(int(done.stdout)))


def test_memory_is_shared_by_itself() -> None:
    assert VmConfig(disks=[DiskConfig(path="/x", offload=True)]).has_backends
    assert not VmConfig(disks=[DiskConfig(path="/x")]).has_backends

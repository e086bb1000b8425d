"""A disk and an interface that processes of their own serve, started by pileus."""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.guest.conftest import NewNetwork, StartGuest
from tests.guest.guest import Guest

pytestmark = pytest.mark.needs("--disk", "--net")
MIB = 1 << 20


def _children(guest: Guest) -> list[int]:
    """Processes of back-ends."""
    tasks = Path(f"/proc/{guest.process.pid}/task").glob("*/children")
    return [int(each) for task in tasks for each in task.read_text().split()]


@pytest.mark.parametrize("pci", ["on", "off"])
def test_data_is_right_although_the_processes_are_killed_and_nobody_is_left(
    start: StartGuest, network: NewNetwork, folder: Path, pci: str
) -> None:
    image, net = folder / "disk", network()
    image.write_bytes(bytes(16 * MIB))
    guest: Guest = start(
        "--disk", f"path={image},offload=on,num_queues=2", "--net", f"{net.option},offload=on", "--pci", pci,
        do="shell", cmdline="console=ttyS0 quiet pileus.modules=virtio", cpus="2",
    )  # fmt: skip
    guest.shell()
    guest.run(f"ip link set eth0 up; ip addr add {net.guest}/24 dev eth0")
    assert " 0% packet loss" in guest.run(f"ping -c 2 -W 20 {net.host}")
    told = guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; md5sum </tmp/data")
    guest.run("dd if=/tmp/data of=/dev/vda bs=1M conv=fsync")
    before = _children(guest)
    assert len(before) == 2
    guest.type("dd if=/tmp/data of=/dev/vda bs=4k seek=2048 oflag=direct && echo wri''tten\n")
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    guest.expect("written")
    guest.shell()
    assert " 0% packet loss" in guest.run(f"ping -c 2 -W 20 {net.host}")
    after = _children(guest)
    assert len(after) == 2
    assert not set(before) & set(after)
    guest.type("poweroff -f\n")
    assert guest.wait() == 0
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in after) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in after)
    data = image.read_bytes()
    assert hashlib.md5(data[: 8 * MIB]).hexdigest() in told
    assert hashlib.md5(data[8 * MIB :]).hexdigest() in told

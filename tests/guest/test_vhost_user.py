"""Guests whose disks, directories and interfaces other programs serve: Debian's, and none of ours."""

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest import system
from tests.guest.conftest import NewNetwork, StartGuest
from tests.guest.guest import Guest
from tests.guest.system import Network
from tests.listening import PATIENCE
from tests.peer.vhost_user import LIBRARIES, PROGRAMS, Backend, missing

DAEMON = "qemu-storage-daemon"
MIB = 1 << 20
DISK_MIB = 64
MAC = "2e:00:00:00:00:01"
ADDRESS, GATEWAY = "10.0.2.15", "10.0.2.2"
LOADED = "console=ttyS0 quiet pileus.modules=virtio"
Serve = Callable[[list[str], Path], Backend]

needs_daemon = pytest.mark.skipif(shutil.which(DAEMON) is None, reason=f"no {DAEMON}: run scripts/setup test")
needs_virtiofsd = pytest.mark.skipif(missing("virtiofsd"), reason="no virtiofsd: run scripts/setup test")
needs_testpmd = pytest.mark.skipif(missing("dpdk-testpmd"), reason="no dpdk-testpmd: run scripts/setup test")
needs_passt = pytest.mark.skipif(missing("passt"), reason="no passt: run scripts/setup test")
# Each of the three on one of the transports, and on the other where there is time.
on_pci = pytest.mark.parametrize("pci", ["on", pytest.param("off", marks=pytest.mark.long)])
on_mmio = pytest.mark.parametrize("pci", ["off", pytest.param("on", marks=pytest.mark.long)])


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a back-end; after the test none runs."""
    backends: list[Backend] = []

    def serve(command: list[str], socket: Path) -> Backend:
        backends.append(Backend(command, socket))
        return backends[-1]

    yield serve
    for backend in backends:
        backend.kill()


def storage_daemon(serve: Serve, disk: Path, queues: int = 1) -> Backend:
    socket = disk.with_name("blk.socket")
    command = [
        DAEMON, "--blockdev", f"driver=file,filename={disk},node-name=d0,aio=threads",
        "--object", "iothread,id=io0", "--export",
        f"type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={socket},writable=on"
        f",iothread=io0,num-queues={queues}",
    ]  # fmt: skip
    return serve(command, socket)


def power_off(guest: Guest) -> None:
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


@needs_daemon
@on_pci
def test_a_disk_is_read_and_written(start: StartGuest, serve: Serve, tmp_path: Path, pci: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * (DISK_MIB * MIB // 256))
    backend = storage_daemon(serve, disk, queues=2)
    option = f"sock={backend.socket},num_queues=2"
    guest: Guest = start("--vhost-user-blk", option, "--pci", pci, do="shell", cmdline=LOADED, cpus="2")
    guest.shell()
    assert guest.run("cat /sys/block/vda/size") == str(DISK_MIB * MIB // 512)
    assert hashlib.md5(disk.read_bytes()).hexdigest() in guest.run("md5sum /dev/vda")
    told = guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=8; md5sum </tmp/data")
    guest.run("dd if=/tmp/data of=/dev/vda bs=1M seek=4 conv=fsync")
    with disk.open("rb") as file:
        file.seek(4 * MIB)
        assert hashlib.md5(file.read(8 * MIB)).hexdigest() in told
    power_off(guest)


@needs_daemon
def test_a_disk_whose_back_end_is_killed_goes_on(start: StartGuest, serve: Serve, tmp_path: Path) -> None:
    """One request at a time: this back-end notes nowhere what it had begun."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(DISK_MIB * MIB)
    backend = storage_daemon(serve, disk)
    guest: Guest = start("--vhost-user-blk", f"sock={backend.socket}", do="shell", cmdline=LOADED)
    guest.shell()
    guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=8")
    told = guest.run("md5sum </tmp/data")
    for _ in range(3):
        guest.type("dd if=/tmp/data of=/dev/vda bs=4k oflag=direct && echo wri''tten\n")
        backend.kill()
        backend.start()
        guest.expect("written")
        guest.shell()
        assert hashlib.md5(disk.read_bytes()[: 8 * MIB]).hexdigest() in told
    power_off(guest)


@needs_daemon
def test_a_system_boots_from_such_a_disk(start: StartGuest, serve: Serve) -> None:
    if reason := system.why_not():
        pytest.skip(reason)
    folder = system.new_folder()
    try:
        backend = storage_daemon(serve, system.copy_of_root(folder))
        cmdline = "root=/dev/vda rw console=ttyS0 quiet"
        guest: Guest = start("--disk", f"vhost_user=on,socket={backend.socket}", do="root", cmdline=cmdline)
        guest.expect("root@cloud:~#", system.BOOT_TIMEOUT)
        guest.type("systemctl poweroff --force\n")
        assert guest.wait() == 0
    finally:
        shutil.rmtree(folder)


@needs_virtiofsd
@on_mmio
def test_a_directory_is_shared(start: StartGuest, serve: Serve, tmp_path: Path, pci: str) -> None:
    shared, socket = tmp_path / "shared", tmp_path / "fs.socket"
    shared.mkdir()
    (shared / "greeting").write_text("hello\n")
    command = [str(PROGRAMS / "virtiofsd"), "--socket-path", str(socket), "--shared-dir", str(shared)]
    serve([*command, "--sandbox", "none", "--seccomp", "none", "--log-level", "error"], socket)
    guest: Guest = start("--fs", f"tag=shared,socket={socket}", "--pci", pci, do="shell", cmdline=LOADED)
    guest.shell()
    guest.run("mkdir /mnt; mount -t virtiofs shared /mnt")
    assert guest.run("cat /mnt/greeting") == "hello"
    guest.run("dd if=/dev/urandom of=/mnt/data bs=1M count=8 conv=fsync; mv /mnt/data /mnt/moved")
    data = (shared / "moved").read_bytes()
    assert len(data) == 8 * MIB
    assert hashlib.md5(data).hexdigest() in guest.run("md5sum /mnt/moved")
    guest.run("mkdir /mnt/many; for i in $(seq 200); do echo $i >/mnt/many/$i; done; chmod 600 /mnt/greeting")
    assert {path.name for path in (shared / "many").iterdir()} == set(map(str, range(1, 201)))
    assert (shared / "greeting").stat().st_mode & 0o777 == 0o600
    guest.run("umount /mnt")
    power_off(guest)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[int]:
    """The port of a server on all addresses of this host, with a file ``data`` of 4 MiB."""
    (tmp_path / "data").write_bytes(bytes(range(256)) * (4 * MIB // 256))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@needs_passt
@on_pci
def test_an_interface_needs_no_root_of_the_host(
    start: StartGuest, serve: Serve, tmp_path: Path, web: int, pci: str
) -> None:
    socket = tmp_path / "net.socket"
    command = [str(PROGRAMS / "passt"), "--vhost-user", "-f", "-q", "-s", str(socket), "--runas", "0"]
    serve([*command, "-a", ADDRESS, "-n", "24", "-g", GATEWAY, "--map-host-loopback", GATEWAY], socket)
    guest: Guest = start(
        "--vhost-user-net", f"mac={MAC},sock={socket}", "--pci", pci, do="shell", cmdline=LOADED
    )
    guest.shell()
    assert guest.run("cat /sys/class/net/eth0/address") == MAC
    guest.run(f"ip link set eth0 up; ip addr add {ADDRESS}/24 dev eth0; ip route add default via {GATEWAY}")
    assert "Received 1" in guest.run(f"arping -c 1 -w 20 -I eth0 {GATEWAY}")
    wanted = hashlib.md5((tmp_path / "data").read_bytes()).hexdigest()
    assert wanted in guest.run(f"wget -q -O - http://{GATEWAY}:{web}/data | md5sum")
    power_off(guest)


@needs_testpmd
@on_mmio
def test_an_interface_is_forwarded_by_dpdk(
    start: StartGuest, serve: Serve, tmp_path: Path, web: int, network: NewNetwork, pci: str
) -> None:
    net, socket = network(), tmp_path / "net.socket"
    tap = f"dpdk{net.number}"
    serve(_testpmd(socket, tap), socket)
    _give_address(tap, net)
    guest: Guest = start(
        "--net", f"vhost_user=on,socket={socket},mac={MAC}", "--pci", pci, do="shell", cmdline=LOADED
    )
    guest.shell()
    assert guest.run("cat /sys/class/net/eth0/address") == MAC
    guest.run(f"ip link set eth0 up; ip addr add {net.guest}/24 dev eth0")
    assert "Received 1" in guest.run(f"arping -c 1 -w 20 -I eth0 {net.host}")
    wanted = hashlib.md5((tmp_path / "data").read_bytes()).hexdigest()
    assert wanted in guest.run(f"wget -q -O - http://{net.host}:{web}/data | md5sum")
    power_off(guest)


def _testpmd(socket: Path, tap: str) -> list[str]:
    """It polls, and leaves the other processor alone."""
    words = [str(PROGRAMS / "dpdk-testpmd"), "--lcores", "0@0,1@0", "--main-lcore", "0"]
    words += ["--no-huge", "-m", "256"]
    words += ["--no-pci", "--no-telemetry", "--iova-mode=va", f"--file-prefix=guest{os.getpid()}"]
    for plugin in ("net_vhost", "net_tap", "mempool_ring"):
        words += ["-d", str(LIBRARIES / f"librte_{plugin}.so.25")]
    words += [f"--vdev=net_vhost0,iface={socket},queues=1", f"--vdev=net_tap0,iface={tap}", "--"]
    return [*words, "--forward-mode=io", "--auto-start", "--total-num-mbufs=4096", "--stats-period=1000"]


def _give_address(tap: str, net: Network) -> None:
    deadline = time.monotonic() + PATIENCE
    while not Path("/sys/class/net", tap).exists():
        assert time.monotonic() < deadline, "no TAP"
        time.sleep(0.05)
    subprocess.run(["ip", "addr", "add", f"{net.host}/24", "dev", tap], check=True)
    subprocess.run(["ip", "link", "set", tap, "up"], check=True)

"""pileus-fs, as a stock kernel uses it: with and without DAX, on PCI and on MMIO."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import Guest
from tests.listening import await_listener
from tests.peer.vhost_user import PROGRAMS

MIB = 1 << 20
COMMAND = Path(sys.prefix) / "bin" / "pileus-fs"
LOADED = "console=ttyS0 quiet pileus.modules=virtio"
LONG = 600.0
pytestmark = pytest.mark.needs("--fs")


class Share:
    """A folder, and pileus-fs that shares it at ``socket``."""

    def __init__(self, folder: Path, socket: Path, keys: str) -> None:
        self.folder = folder
        self.socket = socket
        self.command = [str(COMMAND), "--backend", f"path={folder}{keys}", "--socket", str(socket)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        await_listener(self.process, self.socket)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)


@pytest.fixture
def share(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Share]]:
    """A function that shares a folder on a file system of the host's disk."""
    shares: list[Share] = []

    def share(keys: str = "") -> Share:
        shared = folder / "shared"
        shared.mkdir()
        shares.append(Share(shared, tmp_path / "fs.socket", keys))
        return shares[-1]

    yield share
    for each in shares:
        each.kill()


def power_off(guest: Guest) -> None:
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


# A mapping that is written through, as DAX is about.
@pytest.mark.parametrize(
    ("pci", "dax"), [("on", "on"), ("off", "on"), pytest.param("on", "off", marks=pytest.mark.long)]
)
def test_files_go_both_ways(start: StartGuest, share: Callable[..., Share], pci: str, dax: str) -> None:
    fs = share()
    data = os.urandom(8 * MIB)
    (fs.folder / "data").write_bytes(data)
    (fs.folder / "link").symlink_to("/etc")
    option = f"tag=shared,socket={fs.socket},dax={dax}" + (",cache_size=64M" if dax == "on" else "")
    guest: Guest = start("--fs", option, "--pci", pci, do="shell", cmdline=LOADED)
    guest.shell()
    mount = "mount -t virtiofs" + (" -o dax=always" if dax == "on" else "")
    guest.run(f"mkdir /mnt; {mount} shared /mnt; mount | grep virtiofs")
    assert hashlib.md5(data).hexdigest() in guest.run("md5sum /mnt/data")
    guest.run("dd if=/mnt/data of=/mnt/new bs=64k conv=fsync; mv /mnt/new /mnt/moved; sync")
    assert (fs.folder / "moved").read_bytes() == data
    guest.run("dd if=/mnt/data of=/mnt/moved bs=4k count=1 skip=5 seek=7 conv=notrunc,fsync")
    assert (fs.folder / "moved").read_bytes()[28672:32768] == data[20480:24576]
    guest.run("echo more >>/mnt/moved; truncate -s 100 /mnt/data; chmod 600 /mnt/data; chown 5:6 /mnt/data")
    assert (fs.folder / "moved").read_bytes() == data[:28672] + data[20480:24576] + data[32768:] + b"more\n"
    about = (fs.folder / "data").stat()
    assert (about.st_size, about.st_mode & 0o777, about.st_uid, about.st_gid) == (100, 0o600, 5, 6)
    guest.type("mkdir /mnt/many; for i in $(seq 200); do echo $i >/mnt/many/$i; done; echo ma''de\n")
    guest.expect("made")
    guest.shell()
    assert {path.name for path in (fs.folder / "many").iterdir()} == set(map(str, range(1, 201)))
    assert "200" in guest.run("cat /mnt/many/* | wc -l")
    # The link leads to the guest's own /etc, whatever the host has there.
    assert guest.run("readlink /mnt/link") == "/etc"
    assert "No such" in guest.run(
        "ls /mnt/link/hostname /mnt/../nowhere 2>&1; ls /mnt/many/../../mnt/nope 2>&1"
    )
    guest.run("rm -r /mnt/many; umount /mnt")
    assert not (fs.folder / "many").exists()
    power_off(guest)


def test_more_is_mapped_than_the_window_holds(start: StartGuest, share: Callable[..., Share]) -> None:
    fs = share()
    data = os.urandom(24 * MIB)
    (fs.folder / "data").write_bytes(data)
    guest: Guest = start(
        "--fs", f"tag=shared,socket={fs.socket},cache_size=8M", do="shell", cmdline=LOADED
    )  # four ranges of 2 MiB
    guest.shell()
    guest.run("mkdir /mnt; mount -t virtiofs -o dax=always shared /mnt")
    for _ in range(2):
        assert hashlib.md5(data).hexdigest() in guest.run("md5sum /mnt/data")
    guest.run("cp /mnt/data /mnt/copy; sync")
    assert (fs.folder / "copy").read_bytes() == data
    power_off(guest)


def test_a_back_end_that_is_killed_costs_its_mount_only(
    start: StartGuest, share: Callable[..., Share]
) -> None:
    fs = share()
    (fs.folder / "file").write_text("before\n")
    guest: Guest = start("--fs", f"tag=shared,socket={fs.socket},dax=off", do="shell", cmdline=LOADED)
    guest.shell()
    guest.run("mkdir /mnt; mount -t virtiofs shared /mnt")
    assert guest.run("cat /mnt/file") == "before"
    fs.kill()
    fs.start()
    guest.expect_log("is back")
    (fs.folder / "file").write_text("afterwards\n")
    guest.run("umount -l /mnt; mkdir /again; mount -t virtiofs shared /again || echo busy")
    assert guest.run("echo the guest lives") == "the guest lives"
    power_off(guest)


def virtiofsd(folder: Path, socket: Path) -> list[str]:
    words = [str(PROGRAMS / "virtiofsd"), "--socket-path", str(socket), "--shared-dir", str(folder)]
    return [*words, "--sandbox", "none", "--seccomp", "none", "--log-level", "error"]


@pytest.mark.long
@pytest.mark.parametrize("server", ["pileus-fs", "virtiofsd"])
def test_ten_thousand_files_and_a_gib_are_right(
    start: StartGuest, share: Callable[..., Share], server: str
) -> None:
    fs = share()
    if server == "virtiofsd":
        fs.kill()
        fs.command = virtiofsd(fs.folder, fs.socket)
        fs.start()
    guest: Guest = start("--fs", f"tag=shared,socket={fs.socket},dax=off", do="shell", cmdline=LOADED)
    guest.shell()
    guest.run("mkdir /mnt; mount -t virtiofs shared /mnt; mkdir /mnt/many; cd /mnt/many")
    guest.type("for i in $(seq 10000); do echo $i >$i; done; echo ma''de\n")
    guest.expect("made", LONG)
    guest.shell()
    assert sum(int((fs.folder / "many" / str(number)).read_text()) for number in range(1, 10001)) == 50005000
    guest.type("cat * | awk '{ sum += $1 } END { print \"sum=\" sum }'\n")
    guest.expect("sum=50005000", LONG)
    guest.shell()
    guest.type("cd /; dd if=/dev/urandom of=/mnt/big bs=1M count=1024 conv=fsync; echo writ''ten\n")
    guest.expect("written", LONG)
    guest.shell()
    digest = hashlib.md5()
    with (fs.folder / "big").open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    assert (fs.folder / "big").stat().st_size == 1024 * MIB
    guest.type("echo 3 >/proc/sys/vm/drop_caches; md5sum /mnt/big\n")
    guest.expect(digest.hexdigest(), LONG)
    guest.shell()
    power_off(guest)

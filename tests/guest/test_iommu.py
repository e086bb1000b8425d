"""Devices behind the virtual IOMMU of a Debian kernel: which they are, and that their data is right."""

import functools
import hashlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import NewNetwork, StartGuest
from tests.guest.guest import TRIXIE_PVH, Guest
from tests.guest.system import System, segment, why_not

pytestmark = pytest.mark.needs("--disk", "--net", "--vsock")

MIB = 1 << 20
PATIENCE = 120.0
CMDLINE = "console=ttyS0 quiet pileus.modules=virtio"
# Devices behind an IOMMU are probed again, some time after its driver has come.
GROUPS = """
count=0
until [ $(ls /sys/bus/virtio/devices | wc -l) = $devices ]; do
    count=$((count + 1))
    [ $count -lt 500 ] || break
    usleep 20000
done
for device in /sys/kernel/iommu_groups/*/devices/*; do
    [ -e "$device" ] && echo "group=${device#/sys/kernel/iommu_groups/} $(cat $device/device)"
done
for device in /sys/bus/pci/devices/*; do
    echo "driver=${device##*/} $(basename $(readlink $device/virtio*/driver))"
done
"""


def fields(text: str, key: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line.removeprefix(f"{key}=") for line in lines if line.startswith(f"{key}=")]


@contextmanager
def served(folder: Path, address: str) -> Iterator[int]:
    """The files of ``folder`` by HTTP; yields the port."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer((address, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_only_those_that_asked_are_behind_it(start: StartGuest, tmp_path: Path, folder: Path) -> None:
    """The reference's test 31: a group each, in the order of their slots."""
    for name in "abc":
        (folder / name).write_bytes(bytes(MIB))
    guest: Guest = start(
        "--disk", f"path={folder}/a,iommu=on", f"path={folder}/b", f"path={folder}/c,iommu=on",
        "--rng", "src=/dev/urandom,iommu=on", "--vsock", f"cid=3,socket={tmp_path}/v,iommu=on",
        do="script", cmdline=CMDLINE, console="null,iommu=on",
        initramfs=segment(f"devices=7{GROUPS}", tmp_path, TRIXIE_PVH.initramfs),
    )  # fmt: skip
    text = guest.expect(r"script=\d+")
    assert guest.wait() == 0
    # 1 console, 2 to 4 disks, 5 entropy, 6 sockets; the IOMMU is behind all
    assert fields(text, "group") == [
        "0/devices/0000:00:01.0 0x1043",
        "1/devices/0000:00:02.0 0x1042",
        "2/devices/0000:00:04.0 0x1042",
        "3/devices/0000:00:05.0 0x1044",
        "4/devices/0000:00:06.0 0x1053",
    ]
    drivers = dict(line.split() for line in fields(text, "driver") if " " in line)
    assert drivers["0000:00:07.0"] == "virtio_iommu"
    assert drivers["0000:00:02.0"] == drivers["0000:00:03.0"] == "virtio_blk"


def test_without_any_there_is_none(start: StartGuest, tmp_path: Path) -> None:
    guest: Guest = start(
        do="script", cmdline=CMDLINE, initramfs=segment(f"devices=1{GROUPS}", tmp_path, TRIXIE_PVH.initramfs)
    )
    text = guest.expect(r"script=\d+")
    assert guest.wait() == 0
    assert fields(text, "group") == []
    assert "virtio_iommu" not in text


@pytest.mark.long
def test_a_disk_behind_it_holds_what_was_written(start: StartGuest, tmp_path: Path, folder: Path) -> None:
    """A file system and raw blocks, with several queues, strict invalidation and without."""
    image, raw = folder / "disk", folder / "raw"
    image.write_bytes(bytes(64 * MIB))
    content = os.urandom(8 * MIB)
    raw.write_bytes(content)
    script = """
set -e
/bin/mke2fs -q -F -t ext4 /dev/vda  # by its path, else the shell takes its own
mkdir -p /mnt
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/one bs=1M count=5 2>/dev/null
cat /mnt/one /mnt/one >/mnt/two
sha256sum /mnt/one /mnt/two >/tmp/sums
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
/bin/e2fsck -f -n /dev/vda
mount -t ext4 /dev/vda /mnt
sha256sum -c /tmp/sums
umount /mnt
echo "raw=$(sha256sum </dev/vdb | cut -c 1-64)"
dmesg | grep -iE "fault from|i/o error" && exit 1
true
"""
    for more in ("", " iommu.strict=1"):
        guest: Guest = start(
            "--disk", f"path={image},iommu=on,num_queues=2", f"path={raw},iommu=on,readonly=on",
            do="script", cmdline=CMDLINE + more, cpus="2",
            initramfs=segment(script, tmp_path, TRIXIE_PVH.initramfs, tools=True),
        )  # fmt: skip
        text = guest.expect(r"script=\d+", 300)
        assert text.endswith("script=0"), text
        assert fields(text, "raw") == [hashlib.sha256(content).hexdigest()]
        assert guest.wait() == 0
        assert "refuses" not in guest.log


def test_an_interface_behind_it_carries_data(
    start: StartGuest, tmp_path: Path, network: NewNetwork, folder: Path
) -> None:
    net = network()
    (folder / "data").write_bytes(data := os.urandom(8 * MIB))
    # The host's server is there once the TAP is, which pileus makes.
    script = f"""
ifconfig eth0 {net.guest} netmask 255.255.255.0 up
ping -c 2 -W 10 {net.host} && echo "pinged=yes"
echo ready
read -r port
wget -q -O /tmp/data http://{net.host}:$port/data
echo "data=$(sha256sum </tmp/data | cut -c 1-64)"
ping -c 2 -W 10 -s 9000 {net.host} && echo "pinged=large"
"""
    guest: Guest = start(
        "--net", net.option + ",iommu=on", do="script", cmdline=CMDLINE,
        initramfs=segment(script, tmp_path, TRIXIE_PVH.initramfs),
    )  # fmt: skip
    guest.expect("ready")
    with served(folder, net.host) as port:
        guest.type(f"{port}\n")
        text = guest.expect(r"script=\d+")
    assert fields(guest.output, "pinged") == ["yes", "large"]
    assert fields(text, "data") == [hashlib.sha256(data).hexdigest()]
    assert guest.wait() == 0
    assert "refuses" not in guest.log


def test_a_driver_that_was_told_of_no_iommu_uses_bypass(
    start: StartGuest, tmp_path: Path, folder: Path
) -> None:
    """``iommu.passthrough=1``: domains in which addresses are those of memory."""
    (folder / "disk").write_bytes(data := os.urandom(8 * MIB))
    script = """
echo "type=$(cat /sys/kernel/iommu_groups/0/type)"
echo "raw=$(sha256sum </dev/vda | cut -c 1-64)"
"""
    guest: Guest = start(
        "--disk", f"path={folder}/disk,iommu=on", do="script", cmdline=CMDLINE + " iommu.passthrough=1",
        initramfs=segment(script, tmp_path, TRIXIE_PVH.initramfs),
    )  # fmt: skip
    text = guest.expect(r"script=\d+")
    assert guest.wait() == 0
    assert fields(text, "type") == ["identity"]
    assert fields(text, "raw") == [hashlib.sha256(data).hexdigest()]


VSOCK_PORT = 1024
COLLECTOR = f"""
import socket
server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, {VSOCK_PORT}))
server.listen()
one, _ = server.accept()
one.sendall(b"".join(iter(lambda: one.recv(65536), b"")))
"""
# The driver leaves its device, and all its mappings go, while requests are on their way; then it comes back.
LEAVE_UNDER_LOAD = """
cd /sys/bus/virtio/drivers/virtio_blk
disk=/dev/disk/by-id/virtio-second
for round in 1 2 3 4 5; do
    name=$(basename "$(readlink -f /sys/block/$(basename "$(readlink -f $disk)")/device)")
    dd if=$disk of=/dev/null bs=64k iflag=direct 2>/dev/null &
    dd if=$disk of=/dev/null bs=4k iflag=direct skip=1000 2>/dev/null &
    sleep 0.3
    echo $name >unbind
    wait
    echo $name >bind
    udevadm settle
done
"""


def test_debian_works_with_a_disk_an_interface_and_sockets_behind_it(
    network: NewNetwork, folder: Path
) -> None:
    """Its load is that of a real system; ssh is by the interface."""
    if reason := why_not():
        pytest.skip(reason)
    way_in = network()
    second = folder / "second"
    with second.open("wb") as file:
        file.truncate(192 * MIB)
    with System(
        [way_in],
        folder,
        cpus="2",
        disks=(f"path={second},iommu=on,num_queues=2,serial=second",),
        network_keys={way_in.number: ",iommu=on"},
        more=("--vsock", f"cid=3,socket={folder}/vsock,iommu=on"),
    ) as system:
        system.connect()
        groups = system.check("ls -d /sys/kernel/iommu_groups/*/devices/* | xargs -n 1 basename | sort")
        assert groups.split() == ["0000:00:02.0", "0000:00:03.0", "0000:00:05.0"]
        system.check(
            "mkfs.ext4 -q -F /dev/vdb && mount /dev/vdb /mnt && cp -a /usr/bin /mnt/copy && sync"
            " && echo 3 >/proc/sys/vm/drop_caches"
            " && diff -r --no-dereference /usr/bin /mnt/copy && umount /mnt"
        )
        system.check(f"cat >collector <<'END'\n{COLLECTOR}END\npython3 collector >collected 2>&1 &")
        data = os.urandom(8 * MIB)
        assert _sent_and_given_back(folder / "vsock", data) == data
        told = system.check("md5sum </dev/disk/by-id/virtio-second")
        system.check(LEAVE_UNDER_LOAD)
        assert system.check("md5sum </dev/disk/by-id/virtio-second") == told
        assert not system.run("dmesg | grep -iE 'fault from|i/o error'").stdout
        assert system.power_off() == 0


def _sent_and_given_back(path: Path, data: bytes) -> bytes:
    """What the guest's COLLECTOR answers to ``data``; it may have yet to listen."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(PATIENCE)
            one.connect(str(path))
            one.sendall(b"CONNECT %d\n" % VSOCK_PORT)
            if one.recv(64).startswith(b"OK "):
                one.sendall(data)
                one.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: one.recv(65536), b""))
        assert time.monotonic() < deadline, "nobody listens in the guest"
        time.sleep(0.2)

"""QEMU as the front-end: a Debian kernel in it uses a disk, an interface and a directory of our back-ends."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guest.guest import Kernel
from tests.guest.system import segment
from tests.unit.net.namespace import Namespace
from tests.unit.vhost_user.commands import Process

MIB = 1 << 20
QEMU = "qemu-system-x86_64"
KERNEL = Kernel("trixie")
HOST, GUEST, MAC = "192.168.77.1", "192.168.77.2", "2e:00:00:00:00:77"
PATIENCE = 300.0  # seconds: an emulated processor on a busy host
SCRIPT = f"""
set -e
ip link set eth0 up
ip addr add {GUEST}/24 dev eth0
ping -c 2 -w 30 {HOST}
ping -c 1 -w 30 -s 1400 {HOST}
mkdir /mnt /shared
/bin/mke2fs -q -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
mount -t virtiofs shared /shared
dd if=/shared/data of=/mnt/data bs=64k conv=fsync
umount /mnt
mount -t ext4 /dev/vda /mnt
echo "sum=$(sha256sum </mnt/data | cut -c 1-64)"
cp /mnt/data /shared/copy
umount /shared
umount /mnt
"""


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}: run scripts/setup test")
@pytest.mark.skipif(not KERNEL.path.exists(), reason="no kernels in .cache/guests: run scripts/guests")
def test_a_guest_of_qemu_works_on_our_back_ends(tmp_path: Path) -> None:
    image, shared = tmp_path / "image", tmp_path / "shared"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    shared.mkdir()
    data = os.urandom(4 * MIB)
    (shared / "data").write_bytes(data)
    initramfs = segment(SCRIPT, tmp_path, KERNEL.initramfs, tools=True)
    net = f"tap=qemu77,ip={HOST},mask=255.255.255.0"
    with (
        Namespace(),
        Process("pileus-blk", ["--backend", f"path={image},image_type=raw"], tmp_path / "blk") as blk,
        Process("pileus-net", ["--backend", net], tmp_path / "net") as tap,
        Process("pileus-fs", ["--backend", f"path={shared}"], tmp_path / "fs") as fs,
    ):
        command = [
            QEMU, "-M", "q35,accel=tcg", "-cpu", "max", "-m", "512", "-display", "none", "-nodefaults",
            "-no-reboot", "-serial", "stdio",
            "-object", "memory-backend-memfd,id=m,size=512M,share=on", "-numa", "node,memdev=m",
            "-kernel", str(KERNEL.path), "-initrd", str(initramfs),
            "-append", "console=ttyS0 quiet panic=-1 pileus.do=script pileus.modules=virtio",
            "-chardev", f"socket,id=b,path={blk.socket}", "-device", "vhost-user-blk-pci,chardev=b",
            "-chardev", f"socket,id=n,path={tap.socket}", "-netdev", "vhost-user,id=n,chardev=n",
            "-device", f"virtio-net-pci,netdev=n,mac={MAC}",
            "-chardev", f"socket,id=f,path={fs.socket}", "-device", "vhost-user-fs-pci,chardev=f,tag=shared",
        ]  # fmt: skip
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE,
            errors="replace",
        )  # fmt: skip
        assert "script=0" in done.stdout, done.stdout + done.stderr
        assert re.search(r"sum=(\w+)", done.stdout)[1] == hashlib.sha256(data).hexdigest()  # type: ignore[index]
        assert [each.end() for each in (blk, tap, fs)] == [0, 0, 0]
    assert (shared / "copy").read_bytes() == data
    subprocess.run(["/sbin/e2fsck", "-f", "-n", str(image)], check=True, capture_output=True)

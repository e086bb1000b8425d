"""pileus within a guest: the guest sees this machine's files, and so has pileus and its kernels as well."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.guest.guest import ASSETS, PILEUS, TRIXIE, TRIXIE_PVH, Guest
from tests.peer.vhost_user import Backend

SUITE = TRIXIE.suite  # its kernel has KVM and VFIO as modules
CMDLINE = "console=ttyS0 quiet panic=-1 pileus.modules=virtio pileus.do=shell innermost"
PATIENCE = 600.0  # seconds: each level of virtual machines takes its toll
# Without interrupts that are remapped, which virtio-iommu has not, VFIO asks to be told that this is meant.
MODULES = ("kvm-amd", "vfio_iommu_type1 allow_unsafe_interrupts=1", "vfio-pci")


@contextmanager
def shared_root(socket: Path) -> Iterator[list[str]]:
    """The words that give a guest this machine's files, for as long as it runs."""
    share = [str(Path(sys.prefix) / "bin" / "pileus-fs"), "--socket", str(socket)]
    with Backend([*share, "--backend", "path=/,readonly=on,cache=always"], socket):
        yield ["--fs", f"tag=host,socket={socket},dax=off"]


def mount_root(guest: Guest) -> None:
    """Make /host in ``guest``, and go there: ``chroot . COMMAND`` then runs what this machine has."""
    guest.run("mkdir /host; mount -t virtiofs -o ro host /host; cd /host; mount -t tmpfs tmp tmp")
    guest.run("mount -t devtmpfs dev dev; mount -t proc proc proc; mount -t sysfs sys sys")


def prepare(guest: Guest) -> None:
    """The same, and load KVM and VFIO."""
    mount_root(guest)
    for module in MODULES:
        assert guest.run(f"chroot . /sbin/modprobe -d {ASSETS / SUITE} {module}", PATIENCE) == ""


def rebind(guest: Guest, device: str, driver: str = "") -> None:
    """Take the device at this path of sysfs from its driver, for ``driver`` or whoever knows it."""
    name = os.path.basename(device)
    guest.run(f"echo {driver} >{device}/driver_override; echo {name} >{device}/driver/unbind")
    guest.run(f"echo {name} >/sys/bus/pci/drivers_probe")


def begin(guest: Guest, *options: str) -> None:
    """Start a guest in ``guest``, on whose console it then is."""
    words = [str(PILEUS), "--kernel", str(TRIXIE_PVH.path), "--initramfs", str(TRIXIE_PVH.initramfs)]
    words += ["--memory", "size=256M", "--console", "off", "--serial", "tty", *options]
    guest.type(f"chroot . {' '.join(words)} --cmdline '{CMDLINE}'\n")
    guest.expect("pileus-init", PATIENCE)
    guest.shell(PATIENCE)
    assert is_innermost(guest)


def end(guest: Guest) -> None:
    """Power off the innermost guest."""
    guest.type("poweroff -f\n")
    guest.shell(PATIENCE)
    assert not is_innermost(guest)


def is_innermost(guest: Guest) -> bool:
    return bool(re.search(r"\binnermost\b", guest.run("cat /proc/cmdline", PATIENCE)))

"""An NVMe controller of the host, bound to vfio-pci, is the guest's.

The machine that runs these tests has such a controller, behind an IOMMU of its own, if scripts/test emulates
it (batch "host-devices"). Its contents are lost.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import within
from tests.guest.conftest import StartGuest
from tests.guest.guest import TRIXIE, Guest

NVME_CLASS, QEMU_VENDOR = "0x010802", "0x1b36"
DEVICES = Path("/sys/bus/pci/devices")
MEMORY = "size=512M"
CMDLINE = "console=ttyS0 quiet pileus.modules=virtio"
pytestmark = [pytest.mark.needs("--device"), pytest.mark.xdist_group("nvme")]


def _candidate() -> Path | None:
    """QEMU's controller, behind an IOMMU, with the serial number "pileus": no real disk is ever taken."""
    for path in sorted(DEVICES.glob("*")):
        ids = [(path / name).read_text().strip() for name in ("class", "vendor")]
        serials = [each.read_text().strip() for each in path.glob("nvme/nvme*/serial")]
        if (
            ids == [NVME_CLASS, QEMU_VENDOR]
            and serials in ([], ["pileus"])
            and (path / "iommu_group").exists()
        ):
            return path
    return None


@pytest.fixture
def nvme() -> Iterator[Path]:
    path = _candidate()
    if path is None or not Path("/dev/vfio/vfio").exists():
        pytest.skip("no emulated NVMe controller (serial pileus) behind an IOMMU here")
    (path / "driver_override").write_text("vfio-pci")
    if (path / "driver").exists():
        (path / "driver/unbind").write_text(path.name)
    Path("/sys/bus/pci/drivers_probe").write_text(path.name)
    assert os.path.basename(os.readlink(path / "driver")) == "vfio-pci"
    yield path
    (path / "driver_override").write_text("\n")


_APPEARS = "until [ -b /dev/nvme0n1 ]; do usleep 50000; done"
_READ = "dd if=/dev/nvme0n1 bs=1M skip=1 count=4 iflag=direct 2>/dev/null | md5sum"


def _write_and_verify(guest: Guest) -> str:
    """Return what the guest says of what is then on the disk, when asked by ``_READ``."""
    guest.run(_APPEARS)
    told = guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null; md5sum </tmp/data")
    guest.run("dd if=/tmp/data of=/dev/nvme0n1 bs=1M seek=1 oflag=direct conv=fsync 2>/dev/null")
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert guest.run(_READ) == told
    return told


@pytest.mark.parametrize("iommu", ["off", "on"])
def test_a_controller_of_the_host_is_used_reset_and_used_after_a_reboot(
    start: StartGuest, nvme: Path, iommu: str
) -> None:
    option = f"path={nvme},id=nvme,iommu={iommu}"
    guest: Guest = start("--device", option, do="shell", memory=MEMORY, cmdline=CMDLINE)
    guest.shell()
    _write_and_verify(guest)
    assert bool(guest.run("ls /sys/kernel/iommu_groups")) == (iommu == "on")
    assert "nvme0q" in guest.run("grep nvme /proc/interrupts")
    guest.run("echo 1 >/sys/class/nvme/nvme0/reset_controller")
    _write_and_verify(guest)
    guest.type("reboot -f\n")
    guest.shell()
    _write_and_verify(guest)
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


def test_a_device_that_is_not_bound_to_vfio_is_told_of(start: StartGuest) -> None:
    path = sorted(DEVICES.glob("*"))[0]
    guest: Guest = start("--device", f"path={path}", memory=MEMORY)
    assert guest.wait() == 1
    assert "--device" in guest.output or "/dev/vfio/vfio" in guest.output


@pytest.mark.long
def test_the_guest_passes_it_on_to_a_guest_of_its_own(start: StartGuest, nvme: Path, tmp_path: Path) -> None:
    """Behind the virtual IOMMU, which confines its DMA to the memory of that guest."""
    with within.shared_root(tmp_path / "fs.socket") as share:
        device = ("--device", f"path={nvme},id=nvme,iommu=on")
        guest: Guest = start(*share, *device, kernel=TRIXIE, do="shell", memory="size=1G", cmdline=CMDLINE)
        guest.shell()
        within.prepare(guest)
        path = guest.run("readlink -f /sys/class/nvme/nvme0/device")
        within.rebind(guest, path, "vfio-pci")
        within.begin(guest, "--device", f"path={path}")
        told = _write_and_verify(guest)
        within.end(guest)
        within.rebind(guest, path)
        guest.run(_APPEARS)
        assert guest.run(_READ) == told
        guest.type("poweroff -f\n")
        assert guest.wait() == 0

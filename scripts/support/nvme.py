"""An emulated machine with an NVMe controller behind an IOMMU, for a VMM there to pass through."""

from pathlib import Path
from typing import Any

from support.host import CACHE, ScriptError

IMAGE, SIZE = CACHE / "results" / "nvme.img", 64 << 20
SERIAL = "pileus"
DEVICES = Path("/sys/bus/pci/devices")
NVME_CLASS, QEMU_VENDOR = "0x010802", "0x1b36"
# What ``nested.run_nested`` is told besides.
MACHINE: dict[str, Any] = {
    "machine": "q35,kernel-irqchip=split",
    "append": "intel_iommu=on",
    "modules": ["tun", "vfio-pci", "nvme"],
    "qemu": [
        "-device", "intel-iommu,intremap=on",
        "-drive", f"if=none,id=nvme,file={IMAGE},format=raw",
        "-device", f"nvme,serial={SERIAL},drive=nvme",
    ],
}  # fmt: skip


def make_image() -> None:
    """Zeroes for the controller, before the machine starts."""
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    with IMAGE.open("wb") as file:
        file.truncate(SIZE)


def bind() -> Path:
    """In that machine: give the controller to vfio-pci, return its path. No real disk is ever taken."""
    for path in sorted(DEVICES.glob("*")):
        ids = [(path / name).read_text().strip() for name in ("class", "vendor")]
        serials = [each.read_text().strip() for each in path.glob("nvme/nvme*/serial")]
        if ids == [NVME_CLASS, QEMU_VENDOR] and serials in ([], [SERIAL]) and (path / "iommu_group").exists():
            (path / "driver_override").write_text("vfio-pci")
            if (path / "driver").exists():
                (path / "driver/unbind").write_text(path.name)
            Path("/sys/bus/pci/drivers_probe").write_text(path.name)
            return path
    raise ScriptError(f"no emulated NVMe controller with the serial number {SERIAL} behind an IOMMU here")

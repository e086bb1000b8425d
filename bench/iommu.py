"""What the virtual IOMMU costs: block requests and packets with and without it; an NVMe controller by VFIO.

The first two run on this very host, each page mapped by itself, the most that Linux asks for. The controller
is the emulator's, given to guests beside a virtio disk: what it can do is the emulator's, too, but not what
the same guest pays for the virtual IOMMU, nor how often it leaves for the VMM.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support import guests, nvme
from support.bench import Options, Row
from support.block_load import compared
from support.block_load import engine as block_engine
from support.host import CACHE, PILEUS, ROOT, VENV, ScriptError
from support.initramfs import Cpio
from support.nested import run_nested
from support.net_load import CASES, Case, Figure, more, namespace, rows
from support.net_load import engine as net_engine

GOALS = ("bench",)
BEHIND, WITHOUT = "behind the virtual IOMMU", "without"
GUEST = guests.GUESTS / "trixie"
REQUESTS = 2000
PATIENCE = 600.0
DISKS = {"VFIO NVMe": "nvme0n1", "virtio-blk": "vda"}
# Reads a disk of 64 MiB that nothing caches, and tells the time: /proc/uptime is of 10 ms.
SCRIPT = f"""
for name in {" ".join(DISKS.values())}; do
    until [ -b /dev/$name ]; do usleep 50000; done
    read -r before _ </proc/uptime
    dd if=/dev/$name of=/dev/null bs=4k count={REQUESTS} iflag=direct 2>/dev/null
    read -r after _ </proc/uptime
    echo "took $name $before $after"
done
"""


def run(options: Options) -> list[Row]:
    if options.part:
        return _guest_rows(options.runs)
    found = compared(
        BEHIND, {BEHIND: block_engine(behind_iommu=True), WITHOUT: block_engine()}, options.runs or 5
    )
    if os.geteuid() != 0:
        raise ScriptError("making a network namespace and a TAP takes root")
    measures: dict[str, Callable[[Case], Figure]] = {
        BEHIND: partial(net_engine, behind_iommu=True),
        WITHOUT: net_engine,
    }
    with namespace():
        found += [row for case in CASES for row in rows(case, measures, {}, options.runs or 5)]
    return found + _nested_rows(options.runs or 3)


def _nested_rows(runs: int) -> list[Row]:
    """Run the part that needs a controller, in an emulated machine that has one, and read its rows back."""
    nvme.make_image()
    report = CACHE / "results" / "bench-iommu.json"
    report.unlink(missing_ok=True)
    command = [str(ROOT / "scripts" / "bench"), "iommu", "--part", "guest", "--runs", str(runs)]
    copy = [VENV, ROOT / "src", GUEST / "vmlinux", GUEST / "initramfs.cpio"]
    status = run_nested(
        [*command, "--json", str(report)],
        write=[report.parent], copy=copy, always=True, timeout=1800, **nvme.MACHINE,
    )  # fmt: skip
    if status or not report.exists():
        raise ScriptError("the part of the benchmark with a controller failed")
    return [Row(**row) for row in json.loads(report.read_text())["rows"]]


def _guest_rows(runs: int) -> list[Row]:
    device = nvme.bind()
    rates: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        initramfs = Path(scratch, "initramfs")
        script = Cpio()
        script.file("script", SCRIPT.encode(), 0o755)
        initramfs.write_bytes((GUEST / "initramfs.cpio").read_bytes() + script.finish())
        disk = Path(scratch, "disk")
        disk.write_bytes(bytes(nvme.SIZE))
        for _ in range(runs):
            for iommu in ("on", "off"):
                for name, rate in _measure(initramfs, device, disk, iommu).items():
                    rates.setdefault((name, iommu), []).append(rate)
    found = []
    for name in DISKS:
        metric = f"{name} in an emulated guest, 4 KiB reads, depth 1, {BEHIND}"
        found.append(more(metric, "/s", rates[name, "on"], WITHOUT, rates[name, "off"], 0.0))
    ours, virtio = (rates[name, "off"] for name in DISKS)
    return [
        *found,
        more("VFIO NVMe in an emulated guest, 4 KiB reads", "/s", ours, "virtio-blk", virtio, 0.0),
    ]


def _measure(initramfs: Path, device: Path, disk: Path, iommu: str) -> dict[str, float]:
    """Requests a second, by the disk's name."""
    command = [str(PILEUS), "--kernel", str(GUEST / "vmlinux"), "--initramfs", str(initramfs)]
    command += ["--memory", "size=512M", "--console", "off", "--serial", "tty"]
    command += ["--cmdline", "console=ttyS0 quiet panic=-1 pileus.modules=virtio pileus.do=script"]
    command += ["--device", f"path={device},iommu={iommu}"]
    command += ["--disk", f"path={disk},image_type=raw,iommu={iommu}"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    times = {
        name: float(after) - float(before)
        for name, before, after in re.findall(r"took (\w+) ([\d.]+) ([\d.]+)", done.stdout)
    }
    if times.keys() != set(DISKS.values()):
        raise ScriptError(f"the guest said:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return {name: REQUESTS / times[disk] for name, disk in DISKS.items()}

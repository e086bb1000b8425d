"""Persistent memory with guests on it: what was flushed is there after the VMM was killed."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest import within
from tests.guest.conftest import StartGuest, StartSystem
from tests.guest.guest import TRIXIE_PVH, Guest, Kernel
from tests.guest.system import QUIET, copy_of_root, segment

pytestmark = pytest.mark.needs("--pmem")

MIB = 1 << 20
SIZE = 64 * MIB
MODULES = "console=ttyS0 quiet pileus.modules=virtio pileus.modules=virtio_pmem,nfit,nd_pmem"
KINDS = {"pci": ("on", ""), "mmio": ("off", ""), "nvdimm": ("on", ",nvdimm=on")}
kinds = pytest.mark.parametrize(
    ("pci", "keys"),
    [
        pytest.param(*words, id=kind, marks=[pytest.mark.long] if kind == "mmio" else [])
        for kind, words in KINDS.items()
    ],
)

WAIT = """
until [ -b /dev/pmem0 ]; do usleep 20000; done
"""
# What "ndctl create-namespace --mode fsdax" does: Linux has no DAX on an NVDIMM before.
FSDAX = """
cd /sys/bus/nd/devices/pfn0.0
echo namespace0.0 >/sys/bus/nd/drivers/nd_pmem/unbind
cat /proc/sys/kernel/random/uuid >uuid
echo ram >mode
echo namespace0.0 >namespace
echo pfn0.0 >/sys/bus/nd/drivers/nd_pmem/bind
cd /
"""
# A file system with DAX: what is in a file there was stored in persistent memory and nowhere else.
WRITE = """
ls /dev/pmem0
echo nd=$(ls /sys/bus/nd/devices | tr '\\n' ' ')
echo size=$(cat /sys/block/pmem0/size)
/bin/mke2fs -q -F -t ext4 -b 4096 /dev/pmem0
mkdir /mnt
mount -t ext4 -o dax=always /dev/pmem0 /mnt
echo dax=$(grep -c '/mnt.*dax=always' /proc/mounts)
head -c 9000000 /dev/urandom >/tmp/data
dd if=/tmp/data of=/mnt/data bs=64k conv=fsync 2>/dev/null
sync /mnt
echo sum=$(sha256sum </mnt/data | cut -c 1-64)
echo written
while :; do dd if=/tmp/data of=/mnt/more bs=64k 2>/dev/null; done
"""
READ = """
mkdir /mnt
mount -t ext4 -o dax=always /dev/pmem0 /mnt
echo sum=$(sha256sum </mnt/data | cut -c 1-64)
umount /mnt
/bin/e2fsck -f -n /dev/pmem0 >/dev/null
"""

Boot = Callable[..., Guest]


@pytest.fixture
def boot(start: StartGuest, tmp_path: Path) -> Boot:
    """Boot busybox with ``script`` to run and the persistent memory in ``file``."""

    def boot(script: str, file: Path, pci: str, keys: str = "", kernel: Kernel = TRIXIE_PVH) -> Guest:
        return start(
            "--pci", pci, "--pmem", f"file={file}{keys}", do="script", cmdline=MODULES, kernel=kernel,
            initramfs=segment(script, tmp_path, kernel.initramfs, tools=True),
        )  # fmt: skip

    return boot


def new_file(folder: Path, size: int = SIZE) -> Path:
    path = folder / "pmem"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@kinds
def test_what_was_flushed_survives_the_vmm(boot: Boot, folder: Path, pci: str, keys: str) -> None:
    file = new_file(folder)
    nvdimm = "nvdimm" in keys
    guest = boot(f"set -e{WAIT}{FSDAX if nvdimm else ''}{WAIT}{WRITE}", file, pci, keys)
    text = guest.expect(r"(written|script=\d+)\r*\n").replace("\r", "")
    assert "written" in text, guest.output
    said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert "/dev/pmem0" in text.splitlines()
    assert (said["size"], said["dax"]) == (str((SIZE - (2 * MIB if nvdimm else 0)) // 512), "1")
    assert ("nmem0" in said["nd"].split()) == nvdimm, "a DIMM has a device of its own"
    guest.signal(signal.SIGKILL)
    assert guest.wait() == -signal.SIGKILL
    guest = boot(f"set -e{WAIT}{READ}", file, pci, keys)
    assert f"sum={said['sum']}" in guest.expect(r"script=\d+").replace("\r", "").splitlines()
    assert guest.output.replace("\r", "").rstrip().endswith("script=0")
    assert guest.wait() == 0


def test_ndctl_lists_an_nvdimm(start: StartGuest, folder: Path, tmp_path: Path) -> None:
    with within.shared_root(tmp_path / "fs.socket") as share:
        file = new_file(folder)
        guest: Guest = start(*share, "--pmem", f"file={file},nvdimm=on", do="shell", cmdline=MODULES)
        guest.shell()
        guest.run(WAIT.strip())
        within.mount_root(guest)
        told = json.loads(guest.run("chroot . /usr/bin/ndctl list --regions --dimms --namespaces"))
        guest.type("poweroff -f\n")
        assert guest.wait() == 0
    assert [each["dev"] for each in told["dimms"]] == ["nmem0"]
    (region,) = told["regions"]
    assert (region["size"], region["type"]) == (SIZE, "pmem")
    (namespace,) = region["namespaces"]
    assert (namespace["mode"], namespace["size"], namespace["blockdev"]) == ("raw", SIZE, "pmem0")


def test_discarded_writes_never_reach_the_file(boot: Boot, folder: Path) -> None:
    file = new_file(folder)
    file.chmod(0o400)
    guest = boot(f"set -e{WAIT}{WRITE.replace('while', 'exit 0; while')}", file, "on", ",discard_writes=on")
    assert guest.expect(r"script=\d+").endswith("script=0")
    assert guest.wait() == 0
    assert not any(file.read_bytes())


@pytest.mark.long  # hosts before Linux 6.12 take such a fault asynchronously, for ever: docs/pmem.md
def test_a_file_cut_short_ends_the_vm_and_says_so(boot: Boot, folder: Path) -> None:
    file = new_file(folder)
    guest = boot(
        "echo ready; while :; do dd if=/dev/pmem0 of=/dev/null bs=1M iflag=direct 2>/dev/null; done",
        file, "on",
    )  # fmt: skip
    guest.expect("ready")
    os.truncate(file, 4096)
    assert guest.wait() == 1
    assert "is a file of --pmem or --memory cut short" in guest.log


@pytest.mark.parametrize("suite", ["bullseye", pytest.param("bookworm", marks=pytest.mark.long), "sid"])
def test_every_kernel_finds_both_kinds(start: StartGuest, folder: Path, tmp_path: Path, suite: str) -> None:
    kernel = Kernel(suite)
    files = []
    for number, fill in enumerate((b"\x11", b"\x22")):
        files.append(folder / f"file{number}")
        files[-1].write_bytes(fill * 4 * MIB)
    script = f"""set -e{WAIT}{WAIT.replace("pmem0", "pmem1")}
for disk in /dev/pmem?; do echo sum=$(sha256sum <$disk | cut -c 1-64); done
"""
    guest: Guest = start(
        "--pmem", f"file={files[0]}", f"file={files[1]},nvdimm=on",
        do="script", cmdline=MODULES, kernel=kernel,
        initramfs=segment(script, tmp_path, kernel.initramfs) if kernel.path.exists() else None,
    )  # fmt: skip
    text = guest.expect(r"script=\d+").replace("\r", "")
    assert text.endswith("script=0")
    assert guest.wait() == 0
    seen = {line for line in text.splitlines() if line.startswith("sum=")}
    assert seen == {f"sum={hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files}


# On the root, which is persistent memory: stored through a mapping, read by the disk straight into one.
MAPPED = """
import hashlib, mmap, os
SIZE = 4 << 20
with open("/root/mapped", "w+b") as file:
    file.truncate(SIZE)
    memory = mmap.mmap(file.fileno(), SIZE)
    memory[:] = bytes(range(256)) * (SIZE // 256)
    memory.flush()
with open("/root/from-disk", "w+b") as file:
    file.truncate(SIZE)
    memory = mmap.mmap(file.fileno(), SIZE)
    disk = os.open("/dev/vda", os.O_RDONLY | os.O_DIRECT)
    assert os.preadv(disk, [memory], 0) == SIZE
    memory.flush()
    print(hashlib.sha256(memory).hexdigest())
"""


def test_boot_from_virtio_pmem(debian: StartSystem, folder: Path) -> None:
    """The reference's test of that name, with DAX; then the power is cut."""
    (folder / "pmem").mkdir()
    file = copy_of_root(folder / "pmem")
    system = debian(cmdline=f"{QUIET} root=/dev/pmem0 rootflags=dax=always", more=("--pmem", f"file={file}"))
    assert system.check("grep -c processor /proc/cpuinfo") == "1"
    assert int(system.check("sed -n 's/MemTotal: *//p' /proc/meminfo").split()[0]) > 400_000
    assert "/dev/pmem0 / ext4 rw" in system.check("grep ' / ' /proc/mounts; ls /dev/pmem0")
    assert "dax=always" in system.check("grep ' / ' /proc/mounts")
    told = system.check(f"python3 - <<'END'\n{MAPPED}\nEND\nsync /root/mapped /root/from-disk /root")
    with (folder / "root.img").open("rb") as image:
        assert told == hashlib.sha256(image.read(4 * MIB)).hexdigest()
    system.disconnect()
    system.guest.signal(signal.SIGKILL)
    system.guest.wait()
    # Whoever boots next replays the journal first, and so does e2fsck.
    assert subprocess.run(["/sbin/e2fsck", "-p", str(file)], check=False, capture_output=True).returncode <= 1
    for name, digest in (
        ("mapped", hashlib.sha256(bytes(range(256)) * (4 * MIB // 256)).hexdigest()),
        ("from-disk", told),
    ):
        done = subprocess.run(
            ["/sbin/debugfs", "-R", f"cat /root/{name}", str(file)], check=True, capture_output=True
        )
        assert hashlib.sha256(done.stdout).hexdigest() == digest, name

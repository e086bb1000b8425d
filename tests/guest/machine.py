"""The system that the tests of devices share: one of everything, on PCI or on MMIO."""

import subprocess
from pathlib import Path

from tests.guest.system import Network, System

MIB = 1 << 20
PAIRS = 2  # of queues of the second network interface
MEMORY_MIB = 768
BALLOON_MIB = 64
PATTERN_AT = 5 * MIB  # where the image behind the QCOW2 disk holds PATTERN
PATTERN = b"what lies in the backing file\n" * 1000
DISKS = {  # serial number → what follows path= in --disk
    "raw": "",
    "qcow2": "",
    "backed": "",  # a QCOW2 image, too
    "direct": ",direct=on",
    "readonly": ",readonly=on",
    "queues": ",num_queues=4",
    "holes": "",
}
QCOW2 = ["qcow2", "backed"]
WRITABLE = ["raw", "qcow2", "direct", "queues"]


class Machine(System):
    """``networks`` are three: the way in, one with two queue pairs, and another plain one."""

    def __init__(self, networks: list[Network], folder: Path, *, pci: bool) -> None:
        self.pci = pci
        self.console = folder / "console"
        _, self.pairs, self.last = networks
        super().__init__(
            networks,
            folder,
            pci=pci,
            cpus="2",
            memory=f"size={MEMORY_MIB}M",
            disks=tuple(f"path={_image(folder, name)},serial={name}{keys}" for name, keys in DISKS.items()),
            network_keys={self.pairs.number: f",num_queues={2 * PAIRS}"},
            serial="tty",
            console=f"file={self.console}",
            more=("--balloon", f"size={BALLOON_MIB}M,deflate_on_oom=on,free_page_reporting=on"),
        )

    def image(self, name: str) -> Path:
        return image_path(self.folder, name)

    def device(self, name: str) -> str:
        """Return the path of the disk with this serial number in the guest."""
        return f"/dev/disk/by-id/virtio-{name}"

    def interface(self, network: Network) -> str:
        """Return the guest's name for the interface of ``network``."""
        links = self.check("ip -br link").splitlines()
        return next(line.split()[0].partition("@")[0] for line in links if network.mac in line)


def image_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.{'qcow2' if name in QCOW2 else 'img'}"


def _image(folder: Path, name: str) -> Path:
    path = image_path(folder, name)
    if name in QCOW2:
        base = folder / "base.img"
        with base.open("wb") as file:
            file.truncate(96 * MIB)
            file.seek(PATTERN_AT)
            file.write(PATTERN)
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(path))
    elif name == "readonly":
        tree = folder / "tree"
        tree.mkdir()
        (tree / "foo").write_text("bar\n")
        _run("/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path), "16M")
    elif name == "holes":
        path.write_bytes(b"\xa5" * (64 * MIB))
    else:
        with path.open("wb") as file:
            file.truncate(96 * MIB)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

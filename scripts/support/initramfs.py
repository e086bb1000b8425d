"""The guest's initramfs: Debian's busybox, a few shell scripts, and modules of one kernel.

It is left uncompressed: the guest then only copies it, which in software KVM beats decompression.
The same input gives the same bytes.
"""

import lzma
import os
import re
import stat
import subprocess
import tempfile
from pathlib import Path

from support import debug_port
from support.host import ScriptError, run

BUSYBOX = Path("/bin/busybox")
GUEST = Path(__file__).parent / "guest"
# Those of them that a kernel has: 5.10 keeps all of pvpanic in one, 6.12 has virtio_pci and hvc built in.
MODULES = [
    "pvpanic", "pvpanic-mmio", "pvpanic-pci", "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net",
    "virtio_console", "virtio_rng", "virtio_balloon", "virtio_pmem", "nd_pmem", "nfit",
    "virtio_iommu", "crc32c_generic", "ext4",
]  # fmt: skip
TOOLS = ["/sbin/mke2fs", "/sbin/e2fsck"]  # e2fsprogs is on every Debian; busybox's mke2fs makes no ext4
APPLETS = GUEST / "applets"  # those of busybox that the guest has as commands


def build(modules: Path, release: str) -> bytes:
    """Return the cpio archive for kernel ``release`` whose modules lie in ``modules``."""
    archive = Cpio()
    for directory in ("dev", "etc", "proc", "sys", "tmp"):
        archive.directory(directory)
    archive.console("dev/console")
    add_busybox(archive)
    archive.file("init", program := debug_port.program(), 0o755)
    archive.file("bin/debug-port", program, 0o755)
    archive.file("etc/rc", (GUEST / "rc").read_bytes(), 0o755)
    for script in ("report", "tell"):
        archive.file(f"bin/{script}", (GUEST / script).read_bytes(), 0o755)
    add_modules(archive, modules, release, MODULES)
    return archive.finish()


def tools() -> bytes:
    """Return a cpio archive to append to any of these: ``TOOLS``, with the files they load."""
    archive, files = Cpio(), {"/etc/mke2fs.conf"}
    for tool in TOOLS:
        archive.file(f"bin/{Path(tool).name}", Path(tool).read_bytes(), 0o755)
        files.update(re.findall(r"(/\S+) \(0x", run(["ldd", tool])))
    folders = {str(folder) for name in files for folder in Path(name).parents if folder != Path("/")}
    for folder in sorted(folders):
        archive.directory(folder[1:])
    for name in sorted(files):
        archive.file(name[1:], Path(name).read_bytes(), 0o755)
    return archive.finish()


def add_busybox(archive: "Cpio") -> None:
    if not BUSYBOX.exists():
        raise ScriptError("/bin/busybox is missing: run scripts/setup guest")
    archive.directory("bin")
    archive.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    known = set(
        subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    )
    for applet in sorted(known.intersection(APPLETS.read_text().split())):
        archive.link(f"bin/{applet}", "busybox")


def add_modules(archive: "Cpio", modules: Path, release: str, names: list[str]) -> None:
    """Add those of ``names`` that the kernel has as modules, and what they depend on."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "lib/modules", release)
        target.mkdir(parents=True)
        for path in _closure(modules, names):
            name, _, packed = path.name.partition(".ko")
            data = path.read_bytes()
            (target / f"{name}.ko").write_bytes(lzma.decompress(data) if packed == ".xz" else data)
        run(["/sbin/depmod", "--basedir", scratch, release])
        for directory in ("lib", "lib/modules", f"lib/modules/{release}"):
            archive.directory(directory)
        for name in [*sorted(path.name for path in target.glob("*.ko")), "modules.dep"]:
            archive.file(f"lib/modules/{release}/{name}", (target / name).read_bytes(), 0o644)


def _closure(modules: Path, names: list[str]) -> list[Path]:
    wanted = {name.replace("-", "_") for name in names}
    found: set[Path] = set()
    for line in (modules / "modules.dep").read_text().splitlines():
        first, _, rest = line.partition(":")
        if Path(first).name.partition(".ko")[0].replace("-", "_") in wanted:
            found.update(modules / path for path in (first, *rest.split()))
    return sorted(found)


class Cpio:
    """Writes the "newc" format: owner root, inodes counted up, and time 0 except in a copied tree.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        self._add(name, b"", 0o040755)

    def file(self, name: str, data: bytes, mode: int) -> None:
        self._add(name, data, 0o100000 | mode)

    def link(self, name: str, target: str) -> None:
        self._add(name, target.encode(), 0o120777)

    def console(self, name: str) -> None:
        self._add(name, b"", 0o020600, device=(5, 1))

    def tree(self, path: Path, prefix: str) -> None:
        """Add the file or folder ``path`` below ``prefix``, with its times, on which .pyc files depend."""
        for parent in reversed(path.parents[:-1]):
            self._add(f"{prefix}{parent}", b"", 0o040755)
        found = [path, *sorted(path.rglob("*"))] if path.is_dir() and not path.is_symlink() else [path]
        for entry in found:
            status = entry.lstat()
            if stat.S_ISLNK(status.st_mode):
                self._add(f"{prefix}{entry}", os.readlink(entry).encode(), status.st_mode)
            elif stat.S_ISDIR(status.st_mode):
                self._add(f"{prefix}{entry}", b"", status.st_mode)
            elif stat.S_ISREG(status.st_mode):
                self._add(f"{prefix}{entry}", entry.read_bytes(), status.st_mode, time=int(status.st_mtime))

    def finish(self) -> bytes:
        self._add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)

    def _add(
        self, name: str, data: bytes, mode: int, device: tuple[int, int] = (0, 0), time: int = 0
    ) -> None:
        self._inode += 1
        links, size, encoded = 1, len(data), os.fsencode(name)
        fields = (self._inode, mode, 0, 0, links, time, size, 0, 0, *device, len(encoded) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded + b"\0"
        self._parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]

"""Stock Debian kernels to boot, and a system: ``scripts/guests [SUITE]… [system] [--refresh]``.

Each suite has a folder in .cache/guests:

==================  ==========================================================================
vmlinuz             the bzImage of linux-image-cloud-amd64
config              its configuration
release             what ``uname -r`` prints there
lib/modules/        its modules
initramfs.cpio      busybox, the scripts of support/guest and a few of those modules
vmlinux             trixie only: the ELF file inside the bzImage
vmlinux-nopvh       trixie only: the same with its PVH note disabled
==================  ==========================================================================

``generic`` is of linux-image-amd64: the cloud kernels cannot do without ACPI. It is that of ``host``.

``tools.cpio`` beside them is to be appended to an initramfs: e2fsprogs, with its libraries. ``host`` is the
kernel of the emulated machine that scripts/nested makes, a tree with boot/ and lib/modules. ``system`` is a
Debian 13 on a disk: see support/system.py.
What the cache has is kept, so that all works off line; --refresh asks for newer packages.
"""

import argparse
import re
import shutil
from pathlib import Path

from support import apt, debug_port, initramfs, kernel_image
from support.host import CACHE, ScriptError, digest, only_one, run, say

GUESTS = CACHE / "guests"
GENERIC = "generic"
SUITES = ("bullseye", "bookworm", "trixie", "sid", GENERIC)
OTHERS = ("host", "system")
META_PACKAGE = "linux-image-cloud-amd64"
ELF_SUITE = "trixie"
# The cloud kernels have no 9p, over which the emulated machine reads its root file system.
HOST_SUITE, HOST_PACKAGE = "bookworm", "linux-image-amd64"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/guests", description="fetch stock Debian kernels to boot")
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"{', '.join(SUITES)}, host or system (default: all but those two)",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="look for newer packages than those in .cache/guests"
    )
    options = parser.parse_args(arguments)
    for suite in options.suites:
        if suite not in (*SUITES, *OTHERS):
            parser.error(f"{suite}: a suite is one of {', '.join((*SUITES, *OTHERS))}")
    from support import setup, system

    apt.install(setup.PACKAGES["guest"])
    kernels = tuple(suite for suite in options.suites if suite not in OTHERS)
    absent = fetch(kernels if options.suites else SUITES, refresh=options.refresh)
    if "system" in options.suites:
        apt.install(setup.PACKAGES["system"])
        system.build(refresh=options.refresh)
    if "host" in options.suites:
        fetch_host_kernel(refresh=options.refresh)
    return 1 if absent else 0


def fetch(suites: tuple[str, ...] = SUITES, *, refresh: bool = False) -> list[str]:
    """Bring the kernels of ``suites`` into the cache; return those that could not be had."""
    with only_one("guests"):
        GUESTS.mkdir(parents=True, exist_ok=True)
        (GUESTS / "tools.cpio").write_bytes(initramfs.tools())
        return [suite for suite in suites if not _fetch_suite(suite, refresh)]


def _fetch_suite(suite: str, refresh: bool) -> bool:
    folder = GUESTS / suite
    if refresh or not (folder / "release").exists():
        try:
            _take_host_kernel(folder, refresh) if suite == GENERIC else _fetch_kernel(suite, folder)
        except ScriptError as error:
            say(f"guests: {suite} cannot be fetched: {error}")
    if not (folder / "release").exists():
        return False
    _derive(suite, folder)
    return True


def _fetch_kernel(suite: str, folder: Path) -> None:
    archive, names, identity = _resolve(suite, META_PACKAGE)
    if (folder / "package").exists() and (folder / "package").read_text() == identity:
        return
    say(f"guests: fetching {names[0]} of {suite}")
    scratch = GUESTS / f"{suite}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    archive.unpack(names, scratch / "root")
    (kernel,) = (*scratch.glob("root/boot/vmlinuz-*"), *scratch.glob("root/usr/lib/modules/*/vmlinuz"))[:1]
    (modules,) = (*scratch.glob("root/lib/modules/*"), *scratch.glob("root/usr/lib/modules/*"))[:1]
    release = modules.name
    kernel.rename(scratch / "vmlinuz")
    for config in (*scratch.glob("root/boot/config-*"), *scratch.glob("root/usr/lib/modules/*/config"))[:1]:
        config.rename(scratch / "config")
    (scratch / "lib/modules").mkdir(parents=True)
    modules.rename(scratch / "lib/modules" / release)
    run(["/sbin/depmod", "--basedir", str(scratch), release])
    shutil.rmtree(scratch / "root")
    (scratch / "package").write_text(identity)
    (scratch / "release").write_text(release)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _take_host_kernel(folder: Path, refresh: bool) -> None:
    """Make a guest's kernel of the emulated machine's, without another copy of its modules."""
    if refresh or not (GUESTS / "host").exists():
        _fetch_host_kernel(GUESTS / "host")
    (kernel,) = GUESTS.glob("host/boot/vmlinuz-*")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(kernel, folder / "vmlinuz")
    modules = folder / "lib"
    modules.unlink(missing_ok=True)
    modules.symlink_to("../host/lib")
    release = kernel.name.removeprefix("vmlinuz-")
    (folder / "package").write_text(release)
    (folder / "release").write_text(release)


def _resolve(suite: str, meta: str) -> tuple[apt.Archive, list[str], str]:
    """Return the archive, the packages behind ``meta`` and their versions; sid splits a kernel in three."""
    archive = apt.Archive(suite, CACHE / "apt" / suite)
    archive.update()
    images = [name for name in archive.depends(meta) if re.match(r"linux-image-\d", name)]
    if not images:
        raise ScriptError(f"{meta} depends on no kernel image")
    parts = [name for name in archive.depends(images[0]) if re.match(r"linux-(binary|modules)-\d", name)]
    names = parts or images
    return archive, names, " ".join(f"{name}={archive.version(name)}" for name in names)


def _derive(suite: str, folder: Path) -> None:
    """Make what is made of the packages, when they or the code that makes it have changed."""
    makers = (initramfs, debug_port, kernel_image)
    code = [*(Path(module.__file__ or "") for module in makers), *sorted(initramfs.GUEST.iterdir())]
    busybox = apt.installed("busybox-static").encode()
    package = (folder / "package").read_bytes()
    key = digest([*(path.read_bytes() for path in code), busybox, package])
    stamp = folder / "derived"
    if stamp.exists() and stamp.read_text() == key:
        return
    say(f"guests: making the initramfs of {suite}")
    release = (folder / "release").read_text()
    (folder / "initramfs.cpio").write_bytes(initramfs.build(folder / "lib/modules" / release, release))
    if suite == ELF_SUITE:
        elf = kernel_image.vmlinux((folder / "vmlinuz").read_bytes())
        (folder / "vmlinux").write_bytes(elf)
        (folder / "vmlinux-nopvh").write_bytes(kernel_image.without_pvh(elf))
    stamp.write_text(key)


def fetch_host_kernel(*, refresh: bool = False) -> Path:
    """Return the kernel of the emulated machine, fetched if need be; its tree is laid out as a root."""
    with only_one("guests"):
        folder = GUESTS / "host"
        if refresh or not folder.exists():
            _fetch_host_kernel(folder)
        (kernel,) = folder.glob("boot/vmlinuz-*")
        return kernel


def _fetch_host_kernel(folder: Path) -> None:
    archive, names, _ = _resolve(HOST_SUITE, HOST_PACKAGE)
    say(f"guests: fetching {names[0]} of {HOST_SUITE} for the emulated machine")
    scratch = GUESTS / "host.new"
    shutil.rmtree(scratch, ignore_errors=True)
    archive.unpack(names, scratch)
    (modules,) = scratch.glob("lib/modules/*")
    run(["/sbin/depmod", "--basedir", str(scratch), modules.name])
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)

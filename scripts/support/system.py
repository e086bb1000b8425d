"""A Debian 13 system to boot from a disk: ``scripts/guests system [--refresh]``, as root.

mmdebstrap makes the tree, mke2fs the disk: no loop device, no mount. .cache/guests/system then holds

==================  ==========================================================================
root.img            the disk: ext4 without a partition table (``root=/dev/vda``), sparse
scratch.xfs         only where guests run in an emulated machine: see there, ``scratch``
key, key.pub        logs root in by ssh
known_hosts         the guest's host key under the name ``cloud``
==================  ==========================================================================

The kernel and its modules are those of .cache/guests/trixie, and so is the initramfs that mounts the disk.
support/system holds the files that differ from Debian's. A machine works on a copy of the disk: the
copies of one image have the same machine-id and host key.
"""

import os
import shutil
from pathlib import Path

from support import apt, guests
from support.host import CACHE, ScriptError, digest, has_full_kvm, only_one, run, say

SYSTEM = guests.GUESTS / "system"
SCRATCH = CACHE / "scratch"  # where the emulated machine mounts scratch.xfs
SUITE = "trixie"
FILES = Path(__file__).parent / "system"
HOSTNAME = "cloud"
SIZE = 1536 << 20
INODES = 65536
SCRATCH_SIZE = "24g"
PACKAGES = [
    "systemd-sysv", "udev", "kmod", "util-linux", "openssh-server", "python3", "iproute2", "iputils-ping",
    "ethtool", "iperf3", "socat", "e2fsprogs", "fio",
]  # fmt: skip
LEFT_OUT = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*"]
# What Debian would start although a machine of a few minutes has no use for it. Each start of a program
# costs an emulated processor up to a second.
MASKED = [
    # done by the initramfs, by devtmpfs or when the image was made
    "kmod-static-nodes.service", "modprobe@.service", "systemd-modules-load.service",
    "systemd-remount-fs.service", "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup.service", "systemd-sysctl.service",
    "systemd-user-sessions.service", "systemd-firstboot.service", "systemd-sysusers.service",
    "systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-update-done.service",
    "systemd-machine-id-commit.service", "ldconfig.service",
    # chores
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "e2scrub_reap.service", "fstrim.timer", "systemd-tmpfiles-clean.timer", "systemd-random-seed.service",
    "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-pstore.service",
    # file systems nobody here looks at; /tmp is on the disk
    "dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount", "run-lock.mount",
    "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "tmp.mount",
    # services nobody here asks
    "getty@tty1.service", "getty-static.service", "ssh.socket", "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path", "systemd-binfmt.service", "systemd-creds.socket",
    "systemd-hibernate-clear.service", "systemd-hostnamed.socket", "systemd-initctl.socket",
    "systemd-logind.service", "systemd-pcrextend.socket", "systemd-pcrlock.socket", "sshd-keygen.service",
    "systemd-networkd.service", "systemd-networkd.socket", "systemd-pcrmachine.service",
    "systemd-rfkill.socket", "systemd-sysext.socket", "systemd-tpm2-setup.service",
    "systemd-tpm2-setup-early.service", "systemd-udev-load-credentials.service",
]  # fmt: skip
# Kept: one starts a shell on each console of the kernel, one runs the command of systemd.run=.
GENERATORS = ["systemd-getty-generator", "systemd-run-generator"]


def build(*, refresh: bool = False) -> Path:
    """Return the folder of the system, made if its recipe or the kernel changed; takes a minute or two."""
    if guests.fetch((SUITE,)):
        raise ScriptError(f"the kernel of Debian {SUITE} could not be fetched")
    with only_one("system"):
        recipe = _recipe()
        stamp = SYSTEM / "recipe"
        if refresh or not stamp.exists() or stamp.read_text() != recipe:
            _build(recipe)
        if not has_full_kvm() and not (SYSTEM / "scratch.xfs").exists():
            _build_scratch()
    return SYSTEM


def scratch_disks() -> list[tuple[Path, Path]]:
    """Return what run_nested is to mount so that each guest's copy of the disk costs nothing."""
    return [] if has_full_kvm() else [(SYSTEM / "scratch.xfs", SCRATCH)]


def _recipe() -> str:
    files = [path for path in sorted(FILES.rglob("*")) if path.is_file()]
    parts = [part for path in files for part in (str(path.relative_to(FILES)).encode(), path.read_bytes())]
    return digest([Path(__file__).read_bytes(), (guests.GUESTS / SUITE / "package").read_bytes(), *parts])


def _build(recipe: str) -> None:
    if os.geteuid():
        raise ScriptError("only root can make the Debian system: run scripts/guests system as root once")
    say(f"guests: making a Debian {SUITE} system with mmdebstrap, which takes a minute or two")
    scratch = SYSTEM.with_name("system.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    root = scratch / "root"
    _bootstrap(root)
    _configure(root)
    _keys(scratch, root)
    image = scratch / "root.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    # Nothing is left for the guest's kernel to initialise in the background.
    extended = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    command = ["/sbin/mke2fs", "-q", "-t", "ext4", "-L", "system", "-N", str(INODES), "-E", extended]
    run([*command, "-d", str(root), str(image)])
    shutil.rmtree(root)
    (scratch / "recipe").write_text(recipe)
    shutil.rmtree(SYSTEM, ignore_errors=True)
    scratch.rename(SYSTEM)


def _bootstrap(root: Path) -> None:
    uri, option = apt.mirror()
    run(
        [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
            '--aptopt=Acquire::Languages "none"', '--aptopt=Acquire::Retries "5"',
            '--aptopt=APT::Sandbox::User "root"',  # the cache may lie where the user _apt cannot look
            SUITE, str(root), f"deb {option}{uri} {SUITE} main",
        ],
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip


def _configure(root: Path) -> None:
    shutil.copytree(FILES, root, dirs_exist_ok=True)
    kernel = guests.GUESTS / SUITE / "lib/modules"
    shutil.copytree(kernel, root / "usr/lib/modules", symlinks=True, dirs_exist_ok=True)
    units, generators = root / "etc/systemd/system", root / "etc/systemd/system-generators"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    generators.mkdir(exist_ok=True)
    for path in root.glob("usr/lib/systemd/system-generators/*"):
        if path.name not in GENERATORS:
            (generators / path.name).symlink_to("/dev/null")
    (root / "etc/machine-id").write_text(f"{os.urandom(16).hex()}\n")
    (root / "var/log/journal").mkdir(exist_ok=True)  # so that one boot can tell of the one before


def _keys(folder: Path, root: Path) -> None:
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    for old in root.glob("etc/ssh/ssh_host_*"):
        old.unlink()
    for path, name in ((host_key, f"root@{HOSTNAME}"), (folder / "key", "pileus-tests")):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)])
    public = host_key.with_suffix(".pub").read_text()
    (folder / "known_hosts").write_text(f"{HOSTNAME} {public}")
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(folder / "key.pub", root / "root/.ssh/authorized_keys")


def _build_scratch() -> None:
    """Make a file system for the emulated machine that holds the disk, where a copy of it costs nothing.

    XFS shares blocks between copies (``cp --reflink``) and takes direct I/O, neither of which a tmpfs does.
    """
    say("guests: making the file system that holds the disk in the emulated machine")
    image, scratch = SYSTEM / "scratch.new", SYSTEM / "scratch.xfs"
    protofile = SYSTEM / "protofile"
    # A path of no blocks, no inodes; then the root directory and its only file: xfs(8), "protofile".
    protofile.write_text(f"/\n0 0\nd--777 0 0\nroot.img ---666 0 0 {SYSTEM / 'root.img'}\n$\n")
    image.unlink(missing_ok=True)
    data = f"name={image},file,size={SCRATCH_SIZE}"
    run(["/sbin/mkfs.xfs", "-q", "-m", "reflink=1", "-p", str(protofile), "-d", data])
    # mkfs has written the zeros of the disk: they need not lie on the host's disk.
    run(["cp", "--sparse=always", str(image), str(scratch)])
    image.unlink()
    protofile.unlink()

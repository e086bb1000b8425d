"""A Debian 13 system under pileus, reached over ssh; disk images for it, where copies cost nothing."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.guest.guest import ASSETS, ROOT, TRIXIE_PVH, Guest, Kernel, NotSeenError

SYSTEM = ASSETS / "system"
SCRATCH = ROOT / ".cache" / "scratch"  # the emulated machine mounts an XFS with the system's disk there
SSH_PORT = 22
# An emulated machine on a busy host takes two minutes to a login; a command there a second or more.
BOOT_TIMEOUT = 400.0
COMMAND_TIMEOUT = 240.0
PROBE = 20.0
QUIET = "console=ttyS0 quiet systemd.show_status=0"


def why_not() -> str:
    """Return why no system can be booted here, or the empty string."""
    if not (SYSTEM / "root.img").exists():
        return "no system in .cache/guests: run scripts/guests system as root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid():
        return "only root can make the TAP that a system is reached by"
    return ""


def new_folder() -> Path:
    """Make a folder on a file system with direct I/O and, where there is one, with shared blocks."""
    base = SCRATCH if (SCRATCH / "root.img").exists() else None
    return Path(tempfile.mkdtemp(prefix="pileus-test-", dir=base))


def copy_of_root(folder: Path) -> Path:
    """Return a copy of the system's disk that a guest may write to."""
    source, target = SYSTEM / "root.img", folder / "root.img"
    if SCRATCH in folder.parents:
        source = SCRATCH / "root.img"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", str(source), str(target)], check=True)
    return target


@dataclass
class Network:
    """The subnet 192.168.N.0/24 between one guest and its host; N also numbers the MAC."""

    number: int

    @property
    def host(self) -> str:
        return f"192.168.{self.number}.1"

    @property
    def guest(self) -> str:
        return f"192.168.{self.number}.2"

    @property
    def mac(self) -> str:
        return f"12:34:56:78:90:{self.number:02x}"

    @property
    def option(self) -> str:
        return f"tap=,mac={self.mac},ip={self.host},mask=255.255.255.0"

    @property
    def parameter(self) -> str:
        """What tells the guest its address on the kernel's command line."""
        return f"pileus.net={self.mac},{self.guest}/24"


class System:
    """pileus with the system in it; ``networks[0]`` is the way in.

    Close it, or use it as a context manager.
    """

    _hung: str | None = None  # a command that had no end

    def __init__(
        self,
        networks: list[Network],
        folder: Path,
        *,
        disks: tuple[str, ...] = (),
        network_keys: dict[int, str] | None = None,
        kernel: Kernel = TRIXIE_PVH,
        cmdline: str = QUIET,
        pci: bool = True,
        cpus: str = "1",
        memory: str = "size=512M",
        serial: str = "null",
        console: str = "off",
        more: tuple[str, ...] = (),
    ) -> None:
        """``disks`` come beside the root disk; ``network_keys`` add to ``networks``, by number."""
        self.folder = folder
        self.networks = networks
        keys = network_keys or {}
        words = ["root=/dev/vda", "rw", "panic=-1", cmdline, *(net.parameter for net in networks)]
        self.guest = Guest(
            [
                "--kernel", str(kernel.path), "--initramfs", str(kernel.initramfs),
                "--cmdline", " ".join(words),
                "--cpus", cpus, "--memory", memory, "--pci", "on" if pci else "off",
                "--disk", f"path={copy_of_root(folder)}", *disks,
                "--net", *(f"{net.option}{keys.get(net.number, '')}" for net in networks),
                "--rng", "src=/dev/urandom",
                "--serial", serial, "--console", console, *more,
            ],
            folder / "log",
        )  # fmt: skip
        self._control = Path(tempfile.mkdtemp(prefix="ssh-")) / "control"
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.disconnect()
        self.guest.close()
        shutil.rmtree(self._control.parent, ignore_errors=True)

    def connect(self, timeout: float = BOOT_TIMEOUT) -> Self:
        """Wait until ssh works; one connection then carries all commands."""
        deadline = time.monotonic() + timeout
        while not self._banner():
            if self.guest.process.poll() is not None or time.monotonic() > deadline:
                raise NotSeenError(f"no sshd answers: {self._story()}")
            time.sleep(0.2)
        self._master = subprocess.Popen(
            [*self._ssh(), "-M", "-N", f"root@{self.networks[0].guest}"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not self._control.exists():
            if self._master.poll() is not None or time.monotonic() > deadline:
                raise NotSeenError(f"ssh does not log in: {self._story()}")
            time.sleep(0.1)
        return self

    def disconnect(self) -> None:
        if self._master is not None:
            self._master.terminate()
            self._master.wait()
            self._master = None
        self._control.unlink(missing_ok=True)

    def settle(self) -> Self:
        """Wait until everything that starts at boot has started."""
        self.run("systemctl is-system-running --wait", timeout=BOOT_TIMEOUT)
        return self

    def run(self, command: str, timeout: float = COMMAND_TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Run ``command``, some lines of bash, as the guest's root.

        A guest that once did not answer is given ``PROBE`` seconds to show that it lives: not every test that
        shares it is to wait for the whole time.
        """
        if self._hung is not None and command != "true":
            self.run("true", PROBE)
        try:
            done = subprocess.run(
                [*self._ssh(), f"root@{self.networks[0].guest}", "bash", "-s"],
                input=command, capture_output=True, text=True, check=False, timeout=timeout, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            before = "" if self._hung is None else f", nor before of {self._hung}"
            self._hung = self._hung or command
            text = f"no end after {timeout:g} s of {command}{before}"
            raise NotSeenError(f"{text}\n{self._story()}\n{self.guest.threads()}") from None
        self._hung = None
        return done

    def check(self, command: str, timeout: float = COMMAND_TIMEOUT, *, pipefail: bool = True) -> str:
        """Return what ``command`` printed; each of its lines must succeed, and each part of a pipe."""
        done = self.run(f"set -eu {'-o pipefail' if pipefail else ''}\n{command}", timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}\n{self._story()}"
        return done.stdout.strip()

    def power_off(self, *, force: bool = True) -> int:
        """Power off, return the exit status; ``force`` stops no services first but syncs all disks."""
        self.run(f"systemctl poweroff {'--force' if force else ''}")
        self.disconnect()
        return self.guest.wait()

    def reboot(self) -> None:
        """Reboot and be connected again."""
        self.run("systemctl reboot")
        self.disconnect()
        deadline = time.monotonic() + BOOT_TIMEOUT
        while "the guest asked for a reset" not in self.guest.log and time.monotonic() < deadline:
            time.sleep(0.2)
        self.connect()

    def _banner(self) -> bool:
        try:
            with socket.create_connection((self.networks[0].guest, SSH_PORT), 0.5) as connection:
                connection.settimeout(60)
                return connection.recv(64).startswith(b"SSH-2.0")
        except OSError:
            return False

    def _ssh(self) -> list[str]:
        options = {
            "ControlPath": self._control, "IdentityFile": SYSTEM / "key", "IdentitiesOnly": "yes",
            "UserKnownHostsFile": SYSTEM / "known_hosts", "HostKeyAlias": "cloud", "BatchMode": "yes",
            "ServerAliveInterval": 0, "LogLevel": "ERROR",
        }  # fmt: skip
        return [
            "ssh",
            "-F",
            "none",
            *(word for key, value in options.items() for word in ("-o", f"{key}={value}")),
        ]

    def _story(self) -> str:
        return f"console:\n{self.guest.output[-3000:]}\nlog:\n{self.guest.log[-3000:]}"


def segment(script: str, scratch: Path, initramfs: Path, *, tools: bool = False) -> Path:
    """Return an initramfs like ``initramfs`` with ``script`` as /script, which pileus.do=script runs."""
    data = script.encode()
    parts = [initramfs.read_bytes()]
    if tools:
        parts.append((ASSETS / "tools.cpio").read_bytes())
    for name, mode, content in (("script", 0o100755, data), ("TRAILER!!!", 0, b"")):
        fields = (1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        parts += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]
    target = scratch / "initramfs.cpio"
    target.write_bytes(b"".join(parts))
    return target

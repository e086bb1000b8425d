"""Boots a Debian 13 system with pileus, shows its console, runs commands over ssh, tells how long it took.

``scripts/demo`` on a fresh Debian 12 as root installs what is missing, builds pileus, makes the system and
runs all of this where KVM can run it. It ends with status 0 only if each step happened.
"""

import argparse
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from support import guests, system
from support.host import PILEUS, ROOT, VENV, ScriptError, has_full_kvm, kvm_flavour, run, say
from support.nested import run_nested
from support.setup import setup

SUITE = "trixie"
HOST, GUEST, MASK = "192.168.249.1", "192.168.249.2", "255.255.255.0"
MAC = "12:34:56:78:90:01"
COMMANDS = (
    "uname -a",
    "lsblk",
    "ip -brief address",
    "python3 -c 'import platform; print(platform.freedesktop_os_release()[\"PRETTY_NAME\"])'",
)
PATIENCE = 400.0  # seconds for any one step, in an emulated machine on a busy host


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="boot a Debian system from a disk and reach it over ssh"
    )
    parser.add_argument(
        "--pci", choices=("on", "off"), default="on", help="virtio over PCI (default), or MMIO"
    )
    parser.add_argument(
        "--here", action="store_true", help="boot it on this very machine, installing nothing"
    )
    options = parser.parse_args(arguments)
    if not options.here:
        return _prepare(options.pci)
    return _demonstrate(options.pci)


def _prepare(pci: str) -> int:
    started = time.monotonic()
    setup("build", "system", *([] if has_full_kvm() else ["nested"]))
    run([sys.executable, "-m", "compileall", "-q", "src"], cwd=ROOT)
    say(f"demo: everything is in place after {time.monotonic() - started:.1f} s")
    if not has_full_kvm():
        say(f"demo: {kvm_flavour()}, so pileus runs in a machine that QEMU emulates; that takes longer")
    folder = guests.GUESTS / SUITE
    copy = [VENV, ROOT / "src", folder / "vmlinux", folder / "initramfs.cpio"]
    command = [str(ROOT / "scripts" / "demo"), "--here", "--pci", pci]
    return run_nested(command, copy=copy, disks=system.scratch_disks(), modules=["tun"], timeout=1200)


def _demonstrate(pci: str) -> int:
    if os.geteuid():
        raise ScriptError("only root can make the TAP that the guest is reached by")
    # In the emulated machine there is a file system where a copy of the disk costs nothing.
    base = system.SCRATCH if (system.SCRATCH / "root.img").exists() else None
    with tempfile.TemporaryDirectory(dir=base) as disks, tempfile.TemporaryDirectory() as scratch:
        source, disk = (base or system.SYSTEM) / "root.img", Path(disks, "root.img")
        run(["cp", "--reflink=auto", "--sparse=always", str(source), str(disk)])
        return _boot(pci, disk, Path(scratch))


def _boot(pci: str, disk: Path, folder: Path) -> int:
    kernel, log = guests.GUESTS / SUITE, folder / "log"
    command = [
        str(PILEUS), "--kernel", str(kernel / "vmlinux"), "--initramfs", str(kernel / "initramfs.cpio"),
        "--cmdline", f"root=/dev/vda rw console=ttyS0 panic=-1 pileus.net={MAC},{GUEST}/24",
        "--cpus", "2", "--memory", "size=1G", "--pci", pci, "--disk", f"path={disk}",
        "--net", f"tap=,mac={MAC},ip={HOST},mask={MASK}", "--rng", "src=/dev/urandom",
        "--serial", "tty", "--console", "off", "-vvv", "--log-file", str(log),
    ]  # fmt: skip
    say(f"demo: {' '.join(command)}")
    started = time.monotonic()
    terminal = _Terminal(command)
    try:
        _wait_for_ssh(terminal)
        ssh = _ssh(folder)
        # One connection for all commands: what a handshake takes an emulated processor is seconds.
        with subprocess.Popen([*ssh, "-M", "-N"], stdin=subprocess.DEVNULL) as master:
            try:
                _wait_for_login(folder / "control", master)
                reached = time.monotonic() - started
                for typed in COMMANDS:
                    answer = run([*ssh, typed])
                    print(f"\r\ndemo: ssh root@{GUEST} {typed}\r\n{answer}", flush=True)
                subprocess.run([*ssh, "systemctl poweroff"], check=False, capture_output=True)
            finally:
                master.terminate()
        status = terminal.wait()
    finally:
        terminal.close()
    entered, init = _times(log.read_text())
    print(f"\n\ndemo: exec to kernel entry  {entered:8.3f} s")
    print(f"demo: exec to initramfs     {init:8.3f} s")
    print(f"demo: exec to ssh           {reached:8.3f} s")
    print(f"demo: pileus ended with status {status}", flush=True)
    return status


def _wait_for_ssh(terminal: "_Terminal") -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        terminal.check()
        try:
            with socket.create_connection((GUEST, 22), 0.5) as connection:
                connection.settimeout(30)
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.2)
    raise ScriptError(f"the guest's sshd did not answer within {PATIENCE:g} s")


def _wait_for_login(control: Path, master: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not control.exists():
        if master.poll() is not None or time.monotonic() > deadline:
            raise ScriptError("ssh could not log in")
        time.sleep(0.1)


def _ssh(folder: Path) -> list[str]:
    key = folder / "key"
    shutil.copy(system.SYSTEM / "key", key)
    key.chmod(0o600)  # as ssh wants it, whoever owns the checkout
    options = {
        "IdentityFile": key, "UserKnownHostsFile": system.SYSTEM / "known_hosts",
        "HostKeyAlias": system.HOSTNAME,
        "BatchMode": "yes", "LogLevel": "ERROR", "ControlPath": folder / "control",
    }  # fmt: skip
    return ["ssh", "-F", "none", *(f"-o{key}={value}" for key, value in options.items()), f"root@{GUEST}"]


def _times(log: str) -> tuple[float, float]:
    """Return the seconds from exec to the kernel's first instruction and to the initramfs.

    The log counts from the start of pileus's own code; Python's start before it is measured separately.
    """
    entered = re.search(r"([\d.]+)s: DEBUG:\S+ -- kernel entered", log)
    init = re.search(r"([\d.]+)s: DEBUG:\S+ -- \[Debug I/O port: Userspace code 0x60\]", log)
    if not entered or not init:
        raise ScriptError(f"the log of pileus tells of no kernel entry or of no init:\n{log}")
    started = time.monotonic()
    subprocess.run([str(VENV / "bin" / "python"), "-c", ""], check=True)
    python = time.monotonic() - started
    return float(entered[1]) + python, float(init[1]) + python


class _Terminal:
    """A command on a pseudo-terminal, whose output is shown as it comes."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = os.openpty()
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self._shower = threading.Thread(target=self._show, daemon=True)
        self._shower.start()

    def check(self) -> None:
        """Raise ScriptError if the command has ended."""
        if self._process.poll() is not None:
            raise ScriptError(
                f"pileus ended with status {self._process.returncode} before the guest was reached"
            )

    def wait(self) -> int:
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise ScriptError(f"the guest did not power off within {PATIENCE:g} s") from None
        self._shower.join(5)
        return status

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._shower.join(5)
        os.close(self._master)

    def _show(self) -> None:
        while True:
            if not select.select([self._master], [], [], 0.5)[0]:
                if self._process.poll() is not None:
                    return
                continue
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: pileus has closed the terminal
                return
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

"""Boots a stock Debian kernel with pileus, types a command at its shell, and shows how long each step took.

``scripts/demo`` on a fresh Debian 12 as root installs what is missing, builds pileus, fetches the guest and
runs all of this where KVM can run it. It ends with status 0 only if each step happened.
"""

import argparse
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import apt, guests
from support.host import PILEUS, ROOT, VENV, ScriptError, has_full_kvm, kvm_flavour, run, say
from support.nested import run_nested
from support.setup import PACKAGES, setup

SUITE = "trixie"
PROMPT = "guest# "
COMMANDS = ("uname -a", "nproc", "cat /proc/uptime")
PATIENCE = 180.0  # seconds for any one step, in an emulated machine on a busy host


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="boot a stock Debian kernel and talk to it"
    )
    parser.add_argument(
        "--here", action="store_true", help="boot it on this very machine, installing nothing"
    )
    if not parser.parse_args(arguments).here:
        return _prepare()
    return _boot()


def _prepare() -> int:
    started = time.monotonic()
    setup("build", *([] if has_full_kvm() else ["nested"]))
    apt.install(PACKAGES["guest"])
    if guests.fetch((SUITE,)):
        raise ScriptError(f"the kernel of Debian {SUITE} could not be fetched")
    run([sys.executable, "-m", "compileall", "-q", "src"], cwd=ROOT)
    say(f"demo: everything is in place after {time.monotonic() - started:.1f} s")
    if not has_full_kvm():
        say(f"demo: {kvm_flavour()}, so pileus runs in a machine that QEMU emulates; that takes longer")
    folder = guests.GUESTS / SUITE
    copy = [VENV, ROOT / "src", folder / "vmlinuz", folder / "initramfs.cpio"]
    return run_nested([str(ROOT / "scripts" / "demo"), "--here"], copy=copy, timeout=600)


def _boot() -> int:
    folder = guests.GUESTS / SUITE
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        command = [
            str(PILEUS), "--kernel", str(folder / "vmlinuz"), "--initramfs", str(folder / "initramfs.cpio"),
            "--cmdline", "console=ttyS0 panic=-1 pileus.do=shell", "--cpus", "2", "--memory", "size=512M",
            "--serial", "tty", "--console", "off", "-vvv", "--log-file", str(log),
        ]  # fmt: skip
        say(f"demo: {' '.join(command)}")
        terminal = _Terminal(command)
        try:
            terminal.wait_for(PROMPT)
            for typed in COMMANDS:
                terminal.type(f"{typed}\n")
                terminal.wait_for(f"{typed}\r\n")
                terminal.wait_for(PROMPT)
            terminal.type("poweroff -f\n")
            status = terminal.wait()
        finally:
            terminal.close()
        entered, init = _times(log.read_text())
    print(f"\n\ndemo: exec to kernel entry  {entered:8.3f} s")
    print(f"demo: exec to guest's init  {init:8.3f} s")
    print(f"demo: pileus ended with status {status}", flush=True)
    return status


def _times(log: str) -> tuple[float, float]:
    """Return the seconds from exec to the kernel's first instruction and to the guest's init.

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
        self._unread = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        try:
            while text not in self._unread:
                self._read(deadline, f"waiting for {text!r}")
        except EOFError:
            raise ScriptError(f"pileus ended before the guest said {text!r}") from None
        self._unread = self._unread.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None or select.select([self._master], [], [], 0)[0]:
            try:
                self._read(deadline, "waiting for the end")
            except EOFError:
                break
        return self._process.wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self, deadline: float, doing: str) -> None:
        if not select.select([self._master], [], [], max(0, min(1, deadline - time.monotonic())))[0]:
            if time.monotonic() >= deadline:
                raise ScriptError(f"{doing}: nothing for {PATIENCE:g} s")
            return
        try:
            data = os.read(self._master, 65536)
        except OSError as error:  # EIO: pileus has closed the terminal
            raise EOFError(doing) from error
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        self._unread += data.decode(errors="replace")

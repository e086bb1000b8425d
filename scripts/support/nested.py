"""Runs a command where a full KVM exists: ``scripts/nested [OPTION…] COMMAND…``.

Where the host has vmx or svm and a KVM that runs stock kernels, that is right here. Elsewhere QEMU
emulates an AMD machine with SVM and nested paging in software (TCG), in which Debian's kernel provides
/dev/kvm. Its root is the host's file system: what the command changes there is forgotten, except in
folders named by --write. Output and exit status come back; there is no standard input.

Nothing is left behind: the emulator dies with this process, and its inputs are pipes and memfds.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from support import apt, emulator, guests, initramfs, kernel_image
from support.host import CACHE, ScriptError, digest, has_full_kvm, kvm_flavour, say

TIMED_OUT = 124  # as timeout(1)
LOOK_AGAIN = 2.0  # seconds
L1 = Path(__file__).parent / "l1"
BOOT_MODULES = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd"]
CMDLINE = (
    "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on "
    "nowatchdog tsc=reliable no_timer_check"
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/nested", description="run a command where stock kernels run in KVM"
    )
    parser.add_argument("--memory", default="6G", help="of the emulated machine (default 6G)")
    parser.add_argument("--cpus", type=int, default=2, help="of the emulated machine (default 2)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="kill it then, with status 124")
    parser.add_argument(
        "--write", action="append", default=[], metavar="DIR", help="keep what the command writes there"
    )
    parser.add_argument("--copy", action="append", default=[], metavar="PATH",
                        help="hold this file or folder in memory there: for what is read a lot")  # fmt: skip
    parser.add_argument("--disk", action="append", default=[], metavar="IMAGE=DIR",
                        help="mount this XFS image there; what is changed is forgotten")  # fmt: skip
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="load this kernel module first"
    )
    parser.add_argument("--machine", default="q35", help="QEMU's machine type with its options (default q35)")
    parser.add_argument(
        "--qemu", action="append", default=[], metavar="'OPTION …'", help="more options for QEMU"
    )
    parser.add_argument("--append", default="", metavar="TEXT", help="more kernel parameters")
    parser.add_argument(
        "--always", action="store_true", help="emulate even where the host could do it itself"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show the kernel messages of the emulated machine"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("say which command to run")
    return run_nested(
        command,
        memory=options.memory,
        cpus=options.cpus,
        timeout=options.timeout,
        write=[Path(name).resolve() for name in options.write],
        copy=[Path(name).resolve() for name in options.copy],
        disks=[
            (Path(image).resolve(), Path(folder).resolve())
            for image, _, folder in (text.partition("=") for text in options.disk)
        ],
        modules=options.module,
        machine=options.machine,
        qemu=[word for text in options.qemu for word in shlex.split(text)],
        append=options.append,
        always=options.always,
        verbose=options.verbose,
    )


def run_nested(
    command: list[str],
    *,
    memory: str = "6G",
    cpus: int = 2,
    timeout: float | None = None,
    write: list[Path] | None = None,
    copy: list[Path] | None = None,
    disks: list[tuple[Path, Path]] | None = None,
    modules: list[str] | None = None,
    machine: str = "q35",
    qemu: list[str] | None = None,
    append: str = "",
    always: bool = False,
    verbose: bool = False,
    progress: tuple[Path, float] | None = None,
) -> int:
    """Run ``command`` where a full KVM exists and return its exit status, 124 after ``timeout`` seconds.

    ``progress`` is a file, and the seconds after which an emulated machine is killed if that does not grow.
    """
    if has_full_kvm() and not always:
        return _run_here(command, timeout)
    from support.setup import setup

    setup("nested")
    if verbose:
        say(f"nested: {kvm_flavour()}; emulating a machine")
    kernel, base = _boot_files()
    mounts, devices = _mounts(write or [], copy or [], disks or [])
    archive = initramfs.Cpio()
    archive.file("mounts", mounts.encode(), 0o644)
    for path in copy or []:
        archive.tree(path, "copy")
    archive.file("job", _job(command).encode(), 0o644)
    parameters = f"{CMDLINE} {append} pileus.modules={','.join(modules or [])}"
    arguments = [
        str(emulator.fetch()), "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-vga", "none",
        "-machine", machine, "-accel", "tcg,thread=multi,tb-size=2047", "-cpu", "max",
        "-smp", str(cpus), "-m", memory,
        "-kernel", str(kernel), "-append", parameters,
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
        *devices, *(qemu or []),
    ]  # fmt: skip
    return _Emulator(arguments, base + archive.finish(), verbose).run(timeout, progress)


def _run_here(command: list[str], timeout: float | None) -> int:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _boot_files() -> tuple[Path, bytes]:
    """Return the machine's kernel, as an ELF file, and the part of its initramfs that never changes.

    The ELF file spares the emulated processor the decompression, which would take it seconds.
    """
    image = guests.fetch_host_kernel()
    folder = CACHE / "nested"
    folder.mkdir(parents=True, exist_ok=True)
    elf, base, stamp = folder / "vmlinux", folder / "base.cpio", folder / "made-from"
    sources = (L1 / "init", initramfs.APPLETS, Path(initramfs.__file__), Path(__file__))
    key = digest(
        [
            *(path.read_bytes() for path in sources),
            str(image).encode(),
            apt.installed("busybox-static").encode(),
        ]
    )
    if not stamp.exists() or stamp.read_text() != key:
        elf.write_bytes(kernel_image.vmlinux(image.read_bytes()))
        base.write_bytes(_base_archive(image))
        stamp.write_text(key)
    return elf, base.read_bytes()


def _base_archive(image: Path) -> bytes:
    archive = initramfs.Cpio()
    for directory in ("copy", "dev", "proc", "sys", "host", "upper", "root", "tmp"):
        archive.directory(directory)
    archive.console("dev/console")
    initramfs.add_busybox(archive)
    archive.file("init", (L1 / "init").read_bytes(), 0o755)
    release = image.name.removeprefix("vmlinuz-")
    initramfs.add_modules(archive, image.parent.parent / "lib/modules" / release, release, BOOT_MODULES)
    return archive.finish()


def _mounts(write: list[Path], copy: list[Path], disks: list[tuple[Path, Path]]) -> tuple[str, list[str]]:
    """Return the shell lines that mount what was asked for, and QEMU's options for it."""
    lines = [f"mount --bind /root{shlex.quote(str(guests.GUESTS / 'host/lib/modules'))} /root/lib/modules"]
    devices = []
    for number, folder in enumerate(write):
        tag = f"write{number}"
        devices += ["-fsdev", f"local,id={tag},path={folder},security_model=none,multidevs=remap"]
        devices += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        target = shlex.quote(f"/root{folder}")
        lines.append(f"mkdir -p {target}")
        lines.append(f"mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,access=any {tag} {target}")
    if disks:
        lines.append("chroot /root /sbin/modprobe -a virtio_blk xfs")
    for number, (image, folder) in enumerate(disks):
        # What is written goes to a file without a name, by way of the host's memory.
        drive = f"file={image},format=raw,if=none,id=disk{number},snapshot=on,cache=unsafe,discard=unmap"
        devices += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{number}"]
        target = shlex.quote(f"/root{folder}")
        lines.append(f"mkdir -p {target}")
        lines.append(f"mount -t xfs -o noatime,nouuid /dev/vd{chr(ord('a') + number)} {target}")
    for path in copy:
        # From the initramfs, which the emulator hands over whole: over 9p 50 MB take five seconds.
        lines.append(f"mount --bind {shlex.quote(f'/copy{path}')} {shlex.quote(f'/root{path}')}")
    return "\n".join(lines) + "\n", devices


def _job(command: list[str]) -> str:
    kept = {name: value for name, value in os.environ.items() if name.isidentifier()}
    kept |= {"PYTHONDONTWRITEBYTECODE": "1", "PILEUS_NESTED": "1"}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in kept.items())
    return f"{exports}cd {shlex.quote(os.getcwd())} || exit 126\nexec {shlex.join(command)}\n"


class _Emulator:
    """One QEMU process, three pipes out of it, and the threads that empty them."""

    def __init__(self, arguments: list[str], initrd: bytes, verbose: bool) -> None:
        self._arguments = arguments
        self._initrd = initrd
        self._verbose = verbose
        self._console = bytearray()
        self._status = bytearray()
        self._pumps: list[threading.Thread] = []

    def run(self, timeout: float | None, progress: tuple[Path, float] | None) -> int:
        previous = signal.signal(signal.SIGTERM, _interrupt)
        process = self._start()
        try:
            return self._wait(process, timeout, progress)
        finally:
            process.kill()
            process.wait()
            for pump in self._pumps:
                pump.join(timeout=5)
            signal.signal(signal.SIGTERM, previous)

    def _start(self) -> subprocess.Popen[bytes]:
        memory = os.memfd_create("initrd")
        with os.fdopen(os.dup(memory), "wb") as file:
            file.write(self._initrd)
        self._initrd = b""  # some hundred MB
        arguments = [*self._arguments, "-initrd", f"/proc/self/fd/{memory}"]
        console = self._pipe(_Appender(self._console, sys.stderr.buffer if self._verbose else None))
        arguments += ["-serial", f"file:/proc/self/fd/{console}"]
        ends = [console]
        for name, sink in (("stdout", sys.stdout.buffer), ("stderr", sys.stderr.buffer), ("status", None)):
            end = self._pipe(_Appender(self._status, None) if sink is None else _Appender(None, sink))
            ends.append(end)
            arguments += ["-chardev", f"file,id={name},path=/proc/self/fd/{end},append=on"]
            arguments += ["-device", f"virtserialport,chardev={name},name={name}"]
        # The emulator must not outlive this process, however that ends; Ctrl-C is ours to handle.
        command = ["setpriv", "--pdeathsig", "KILL", *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[memory, *ends]
        )
        for end in (memory, *ends):
            os.close(end)
        return process

    def _pipe(self, sink: "_Appender") -> int:
        reader, writer = os.pipe()
        pump = threading.Thread(target=sink.drain, args=(reader,), daemon=True)
        pump.start()
        self._pumps.append(pump)
        return writer

    def _wait(
        self, process: subprocess.Popen[bytes], timeout: float | None, progress: tuple[Path, float] | None
    ) -> int:
        started = changed = time.monotonic()
        size = -1
        while True:
            try:
                process.wait(LOOK_AGAIN if progress or timeout else None)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if timeout and now - started > timeout:
                say(f"nested: still running after {timeout:g} s, killed")
                return TIMED_OUT
            if progress:
                path, patience = progress
                if path.stat().st_size != size:
                    size, changed = path.stat().st_size, now
                elif now - changed > patience:
                    say(f"nested: nothing new for {patience:g} s, killed")
                    return TIMED_OUT
        for pump in self._pumps:
            pump.join()
        if not self._status.strip():
            tail = self._console.decode(errors="replace").splitlines()[-25:]
            raise ScriptError(
                f"the emulated machine ended, with status {process.returncode}, before the command did:\n"
                + "\n".join(tail)
            )
        return int(self._status)


class _Appender:
    """Empties a pipe into a buffer, a stream, or both."""

    def __init__(self, buffer: bytearray | None, stream: BinaryIO | None) -> None:
        self._buffer = buffer
        self._stream = stream

    def drain(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as source:
            while data := source.read(65536):
                if self._buffer is not None:
                    self._buffer += data
                if self._stream is not None:
                    self._stream.write(data)
                    self._stream.flush()


def _interrupt(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)

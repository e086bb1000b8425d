"""Start of a VM: exec to the kernel's first instruction, exec to init, and memory of an idle VMM.

The first is measured on this very host, even one whose KVM cannot run stock kernels: a kernel of ten
bytes writes to the serial port. The others need a stock kernel and run under scripts/nested if need be.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support import guests
from support.bench import Options, Row, compare
from support.host import CACHE, PILEUS, PYTHON, ROOT, VENV, ScriptError, has_full_kvm
from support.host import run as run_command
from support.nested import run_nested
from support.tiny_kernel import tiny_kernel

GOALS = ("bench",)
QEMU = "QEMU microvm"
PYTHON_PEER = "python -c pass"
GUEST = guests.GUESTS / "trixie"
GUEST_RAM_MIB = 512
MARK = b"\xf5"  # no program prints it by itself: it is not valid UTF-8
OUTPUT_MARKS = (MARK, b"!\n")
# Both say so on stderr right before their first KVM_RUN, whose number is 0xae80.
ENTRY_MARKS = (b"kernel entered", b"type 0xae80")
PILEUS_TELLS_ENTRY = ["-vvv"]
QEMU_TELLS_ENTRY = ["-trace", "kvm_vcpu_ioctl"]
INIT = b"pileus-init"
IDLE = "console=ttyS0 quiet panic=-1 pileus.do=idle"
MEMORY_BUDGET_MIB = 25.0
PATIENCE = 120.0

Commands = dict[str, list[str]]


def run(options: Options) -> list[Row]:
    if options.part:
        return _init_rows(options.runs) + _memory_rows()
    run_command([str(PYTHON), "-m", "compileall", "-q", "src"], cwd=ROOT)
    for file in ("vmlinuz", "vmlinux", "initramfs.cpio"):
        (GUEST / file).read_bytes()  # into the page cache, so that no run pays for the disk
    return _entry_rows(options.runs or 20) + _guest_rows(options.runs or 3)


def _entry_rows(runs: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch, "kernel")
        tiny.write_bytes(tiny_kernel(MARK))
        for name, kernel, initrd in (
            ("tiny kernel", tiny, None),
            ("bzImage", GUEST / "vmlinuz", GUEST / "initramfs.cpio"),
            ("PVH", GUEST / "vmlinux", GUEST / "initramfs.cpio"),
        ):
            commands = _commands(kernel, initrd, IDLE)
            for command, more in zip(commands.values(), (PILEUS_TELLS_ENTRY, QEMU_TELLS_ENTRY), strict=True):
                command.extend(more)
            times = _interleaved(commands, lambda command: _time_to(command, ENTRY_MARKS), runs)
            own, peer = _milliseconds(times["pileus"]), _milliseconds(times[QEMU])
            rows.append(compare(f"exec to first KVM_RUN, {name}", "ms", own, QEMU, peer))
        commands = _commands(tiny, None, "")
        del commands[QEMU]  # its firmware runs first, which kvm_pvm interprets for seconds
        commands[PYTHON_PEER] = [str(PYTHON), "-c", "print('!')"]
        times = _interleaved(commands, lambda command: _time_to(command, OUTPUT_MARKS), runs)
    own, peer = _milliseconds(times["pileus"]), _milliseconds(times[PYTHON_PEER])
    rows.append(compare("exec to first byte on the serial port", "ms", own, PYTHON_PEER, peer, goal=0))
    return rows


def _guest_rows(runs: int) -> list[Row]:
    """Run this benchmark's part that needs a complete KVM, and read its rows back."""
    results = CACHE / "results"
    results.mkdir(exist_ok=True)
    report = results / "bench-boot.json"
    report.unlink(missing_ok=True)
    files = [GUEST / name for name in ("vmlinux", "vmlinuz", "initramfs.cpio")]
    command = [
        str(ROOT / "scripts" / "bench"),
        "boot",
        "--part",
        "guest",
        "--runs",
        str(runs),
        "--json",
        str(report),
    ]
    if (
        run_nested(command, write=[results], copy=[VENV, ROOT / "src", *files], timeout=1800)
        or not report.exists()
    ):
        raise ScriptError("the part of the benchmark that boots stock kernels failed")
    rows = [Row(**row) for row in json.loads(report.read_text())["rows"]]
    if not has_full_kvm():
        for row in rows:
            row.metric += ", emulated host"
    return rows


def _init_rows(runs: int) -> list[Row]:
    rows = []
    for kernel, name in (("vmlinux", "PVH"), ("vmlinuz", "bzImage")):
        commands = _commands(GUEST / kernel, GUEST / "initramfs.cpio", IDLE)
        if lkvm := shutil.which("lkvm"):
            commands["kvmtool"] = _kvmtool(lkvm, GUEST / kernel)
        times = _interleaved(commands, _time_to_init, runs)
        rows += [
            compare(f"exec to init, {name}", "s", times["pileus"], peer, times[peer])
            for peer in commands
            if peer != "pileus"
        ]
    return rows


def _memory_rows() -> list[Row]:
    commands = _commands(GUEST / "vmlinux", GUEST / "initramfs.cpio", IDLE)
    found = {name: _memory(command) for name, command in commands.items()}
    rows = []
    for index, metric in enumerate(("PSS beside guest RAM", "anonymous beside guest RAM")):
        row = compare(metric, "MiB", [found["pileus"][index]], QEMU, [found[QEMU][index]])
        if index == 0:
            verdict = "reached" if row.pileus <= MEMORY_BUDGET_MIB else "missed"
            row.goal = f"{verdict} (at most {MEMORY_BUDGET_MIB:g} MiB)"
        rows.append(row)
    return rows


def _commands(kernel: Path, initrd: Path | None, cmdline: str) -> Commands:
    pileus = [str(PILEUS), "--kernel", str(kernel), "--cpus", "1", "--memory", f"size={GUEST_RAM_MIB}M"]
    pileus += ["--serial", "tty", "--console", "off"]
    # On a KVM of kvm_pvm QEMU's -cpu host fails on MSR 0x10a, which nothing here looks at.
    cpu = "host" if has_full_kvm() else "host,-arch-capabilities"
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", cpu, "-M", "microvm", "-m", str(GUEST_RAM_MIB)]
    qemu += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
    qemu += ["-kernel", str(kernel)]
    if initrd:
        pileus += ["--initramfs", str(initrd), "--cmdline", cmdline]
        qemu += ["-initrd", str(initrd), "-append", cmdline]
    return {"pileus": pileus, QEMU: qemu}


def _kvmtool(program: str, kernel: Path) -> list[str]:
    command = [program, "run", "--cpus", "1", "--mem", str(GUEST_RAM_MIB), "--kernel", str(kernel)]
    return [*command, "--initrd", str(GUEST / "initramfs.cpio"), "--params", IDLE]


def _interleaved(
    commands: Commands, measure: Callable[[list[str]], float], runs: int
) -> dict[str, list[float]]:
    """Measure each command once per round."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(measure(command))
    return times


def _milliseconds(seconds: list[float]) -> list[float]:
    return [value * 1000 for value in seconds]


def _time_to_init(command: list[str]) -> float:
    return _time_to(command, (INIT,))


def _time_to(command: list[str], marks: tuple[bytes, ...]) -> float:
    """Return the seconds from exec until one of ``marks`` is on stdout; the process is killed then."""
    started = time.perf_counter()
    process = _start(command)
    try:
        _read_until(process, marks)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.communicate()


def _memory(command: list[str]) -> tuple[float, float]:
    """Return the PSS and the anonymous memory in MiB of a VMM whose guest idles, less the guest's RAM."""
    process = _start(command)
    try:
        _read_until(process, (INIT,))
        time.sleep(2)  # the guest's shell has yet to fall asleep
        pss = anonymous = 0
        guest_ram = False
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Size":
                guest_ram = int(value.split()[0]) >= GUEST_RAM_MIB * 1024
            elif not guest_ram and key == "Pss":
                pss += int(value.split()[0])
            elif not guest_ram and key == "Anonymous":
                anonymous += int(value.split()[0])
        return pss / 1024, anonymous / 1024
    finally:
        process.kill()
        process.communicate()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PILEUS_ANY_KVM": "1"}  # the tiny kernel runs under any KVM
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def _read_until(process: subprocess.Popen[bytes], marks: tuple[bytes, ...]) -> None:
    assert process.stdout
    seen = b""
    while not any(mark in seen for mark in marks):
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            raise ScriptError(
                f"nothing more within {PATIENCE:g} s after:\n{seen[-2000:].decode(errors='replace')}"
            )
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            raise ScriptError(f"it ended early after:\n{seen[-2000:].decode(errors='replace')}")
        seen += data

"""What offload=on costs: the start, and memory of an idle VM, beside the same devices in one process.

On this very host, whatever its KVM can run: the kernel has ten bytes. Memory is the PSS of the VMM and of its
children together, less the guest's RAM, and what is theirs alone (private, or not shared with each other).
"""

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bench import Options, Row, compare
from support.host import PILEUS
from support.tiny_kernel import tiny_kernel

GOALS = ("bench",)
MARK = b"kernel entered"  # what pileus says on stderr right before its first KVM_RUN
WITHIN = "one process"
RAM_MIB = 512
SETTLED = 1.0  # seconds
PATIENCE = 60.0
DEVICES = {
    "a disk": ["--disk", "path={disk},image_type=raw{offload}"],
    "an interface": ["--net", "tap={tap}{offload}"],
    "both": ["--disk", "path={disk},image_type=raw{offload}", "--net", "tap={tap}{offload}"],
    "four disks": ["--disk", *(f"path={{disk}}{number},image_type=raw{{offload}}" for number in range(4))],
}


def run(options: Options) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        kernel, disk = Path(scratch, "kernel"), Path(scratch, "disk")
        kernel.write_bytes(tiny_kernel(b"!"))
        for path in (disk, *(Path(f"{disk}{number}") for number in range(4))):
            with path.open("wb") as file:
                file.truncate(64 << 20)
        for name, words in DEVICES.items():
            commands = [_command(kernel, disk, words, offload) for offload in (",offload=on", "")]
            rows += _rows(name, commands, options.runs or 20)
    return rows


def _command(kernel: Path, disk: Path, words: list[str], offload: str) -> list[str]:
    devices = [word.format(disk=disk, tap=f"bench{os.getpid() % 10000}", offload=offload) for word in words]
    base = [str(PILEUS), "-vvv", "--kernel", str(kernel), "--cpus", "1", "--memory", f"size={RAM_MIB}M"]
    return [*base, "--serial", "off", "--console", "off", *devices]


def _rows(name: str, commands: list[list[str]], runs: int) -> list[Row]:
    figures: list[list[tuple[float, float, float]]] = [[], []]
    for _ in range(runs):
        for command, found in zip(commands, figures, strict=True):
            found.append(_measure(command))
    rows = []
    for index, (metric, unit) in enumerate(
        (("exec to first KVM_RUN", "ms"), ("PSS", "MiB"), ("memory of their own", "MiB"))
    ):
        own, peer = ([each[index] for each in found] for found in figures)
        rows.append(compare(f"{metric}, {name}", unit, own, WITHIN, peer, goal=0))
    return rows


def _measure(command: list[str]) -> tuple[float, float, float]:
    """Milliseconds to the first KVM_RUN, and both kinds of MiB once it is idle."""
    with _started(command) as (process, milliseconds):
        time.sleep(SETTLED)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        sizes = [_memory(pid) for pid in (process.pid, *map(int, children.split()))]
    return milliseconds, sum(pss for pss, _ in sizes), sum(own for _, own in sizes)


@contextmanager
def _started(command: list[str]) -> Iterator[tuple["subprocess.Popen[bytes]", float]]:
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PILEUS_ANY_KVM": "1"},  # the tiny kernel runs under any KVM
    )
    try:
        _read_until(process, MARK)
        yield process, (time.perf_counter() - began) * 1000
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def _read_until(process: "subprocess.Popen[bytes]", mark: bytes) -> None:
    assert process.stderr
    said = b""
    deadline = time.monotonic() + PATIENCE
    while mark not in said:
        ready, _, _ = select.select([process.stderr], [], [], deadline - time.monotonic())
        data = os.read(process.stderr.fileno(), 65536) if ready else b""
        if not data:
            raise RuntimeError(f"pileus did not start: {said.decode(errors='replace')}")
        said += data


def _memory(pid: int) -> tuple[float, float]:
    """PSS and private memory of a process in MiB, without the guest's RAM."""
    totals = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    ram = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Size":
            ram = int(value.split()[0]) >= RAM_MIB * 1024
        elif key in totals and not ram:
            totals[key] += int(value.split()[0])
    return totals["Pss"] / 1024, (totals["Private_Clean"] + totals["Private_Dirty"]) / 1024

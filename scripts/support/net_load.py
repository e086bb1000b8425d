"""Packets from one compiled driver through one virtio-net device after another, each in a process of its own.

The driver (bench/parts/net_driver.py) shares memory with the device and blasts packets through its queues.
All is in a network namespace of its own, where the stack drops each frame.
"""

import ctypes
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.bench import Row
from support.host import PYTHON, ROOT, ScriptError, say
from support.host import run as run_command

PARTS = ROOT / "bench" / "parts"
DRIVER = PARTS / "net_driver.py"
SECONDS = 1.0
MEMORY = 64 << 20
INTERFACE = "bench0"
DEVICE_CPU, DRIVER_CPU = 0, 1
CLONE_NEWNET = 0x40000000
QUEUE_SIZE, RINGS = 256, 0x10000  # as in parts/net_driver.py
RING_PARTS = (0, 0x2000, 0x4000)  # descriptors, available, used
# Checksums, segmentation both ways, mergeable buffers; indirect descriptors and EVENT_IDX; VERSION_1.
FEATURES = (0x3000FFA3, 1)


class Case(NamedTuple):
    name: str
    mode: str
    length: int  # of a frame, bytes
    gso: int = 0  # bytes of a segment


class Figure(NamedTuple):
    packets: float
    seconds: float
    cpu: float  # seconds of the device's process

    @property
    def rate(self) -> float:
        return self.packets / self.seconds

    @property
    def cost(self) -> float:
        return self.cpu / self.packets


CASES = (
    Case("guest to host, 64 B", "tx", 60),
    Case("guest to host, 1500 B", "tx", 1514),
    Case("guest to host, 64 KiB GSO", "tx", 65214, 1448),
    Case("host to guest, 64 B", "rx", 60),
    Case("host to guest, 1500 B", "rx", 1514),
    Case("host to guest, 64 KiB GSO", "rx", 65214, 1448),
    Case("round trip, 64 B", "rr", 60),
)


def rows(
    case: Case, measures: dict[str, Callable[[Case], Figure]], goals: dict[str, float], runs: int
) -> list[Row]:
    """Figures of the first of ``measures`` beside those of each other, all interleaved."""
    figures: dict[str, list[Figure]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, take in measures.items():
            figure = take(case)
            if figure.packets:
                figures[name].append(figure)
            else:
                say(f"{case.name}, {name}: starved, a run moved no packet and does not count")
    if starved := [name for name, kept in figures.items() if not kept]:
        raise ScriptError(
            f"{case.name}: no run of {' and '.join(starved)} moved a packet: is this machine busy?"
        )
    found = []
    first, *others = measures
    own = figures[first]
    for peer in others:
        other, goal = figures[peer], goals.get(peer, 0.0)
        found.append(more(f"{case.name}, rate", "k/s", rates(own), peer, rates(other), goal))
        if case.gso:
            gigabytes = case.length / 1e6
            own_bytes, other_bytes = ([rate * gigabytes for rate in rates(each)] for each in (own, other))
            found.append(more(f"{case.name}, bytes", "GB/s", own_bytes, peer, other_bytes, goal))
        found.append(less(f"{case.name}, CPU each", "us", costs(own), peer, costs(other), goal))
    return found


def rates(figures: list[Figure]) -> list[float]:
    return [figure.rate / 1e3 for figure in figures]


def costs(figures: list[Figure]) -> list[float]:
    return [figure.cost * 1e6 for figure in figures]


def more(metric: str, unit: str, own: list[float], peer: str, other: list[float], goal: float) -> Row:
    mine, theirs = statistics.median(own), statistics.median(other)
    return _row(metric, unit, mine, peer, theirs, mine / theirs, len(own), goal)


def less(metric: str, unit: str, own: list[float], peer: str, other: list[float], goal: float) -> Row:
    mine, theirs = statistics.median(own), statistics.median(other)
    return _row(metric, unit, mine, peer, theirs, theirs / mine, len(own), goal)


def _row(
    metric: str, unit: str, own: float, peer: str, other: float, ratio: float, runs: int, goal: float
) -> Row:
    verdict = f"{'reached' if ratio >= goal else 'missed'} (ratio {goal:g})" if goal else ""
    return Row(metric, unit, own, other, peer, ratio, runs, verdict)


def engine(case: Case, *, behind_iommu: bool = False) -> Figure:
    """pileus's device, in a process by itself; ``behind_iommu``: each page mapped by itself, too."""
    with shared_memory() as fd:
        command = [str(PYTHON), str(PARTS / "net_backend.py"), str(fd), INTERFACE, str(DRIVER), case.mode]
        command += [str(case.length), str(case.gso), str(SECONDS), str(int(behind_iommu))]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        result = subprocess.run(
            command, stdout=subprocess.PIPE, close_fds=False, env=environment, check=True, timeout=60
        )
    packets, seconds, cpu = result.stdout.split()
    return Figure(int(packets), float(seconds), float(cpu))


@contextmanager
def namespace(*, tap: bool = True) -> Iterator[None]:
    """This thread, and what it starts, in a network namespace that has the TAP, if any, and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise ScriptError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    try:
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
        if tap:
            run_command(["ip", "tuntap", "add", "name", INTERFACE, "mode", "tap"])
            run_command(["ip", "link", "set", INTERFACE, "up"])
        yield
    finally:
        libc.setns(before, CLONE_NEWNET)
        os.close(before)


@contextmanager
def shared_memory() -> Iterator[int]:
    fd = os.memfd_create("bench-net")
    try:
        os.ftruncate(fd, MEMORY)
        os.set_inheritable(fd, True)
        yield fd
    finally:
        os.close(fd)


def driver(case: Case, fd: int, kicks: tuple[int, int], text: str) -> subprocess.Popen[bytes]:
    words = [case.mode, fd, *kicks, text, INTERFACE, case.length, case.gso, SECONDS]
    return python(DRIVER_CPU, DRIVER, *words)


def python(cpu: int, script: Path, *words: object) -> subprocess.Popen[bytes]:
    """A part of this benchmark, pinned to ``cpu``, with the descriptors it inherits."""
    command = ["taskset", "-c", str(cpu), str(PYTHON), str(script), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, close_fds=False, env=environment)


def measure(driver: subprocess.Popen[bytes], device: int) -> Figure:
    """Wait for the driver's figures; ``device`` is the process whose CPU time counts."""
    expect(driver, b"go\n")
    assert driver.stdout
    before = _cpu_seconds(device)
    packets, seconds = driver.stdout.readline().split()
    cpu = _cpu_seconds(device) - before
    driver.wait()
    return Figure(int(packets), float(seconds), cpu)


def expect(driver: subprocess.Popen[bytes], line: bytes) -> None:
    assert driver.stdout
    if driver.stdout.readline() != line:
        raise ScriptError("the driver of the benchmark failed")


def _cpu_seconds(pid: int) -> float:
    """Of all threads, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

"""Block requests from one compiled driver to one server after another, on the same rings.

The driver is in this process and offers its requests through memory and eventfds that it shares with the
server; pinned alike, each to a core of its own. The disk is a file in the page cache.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bench import Row
from support.host import ROOT, ScriptError
from support.vhost_front import VhostFront

sys.path.insert(0, str(ROOT / "src"))

DISK_SIZE = 512 << 20
MEMORY_SIZE = 64 << 20
RING_SIZE = 256
SECONDS = 1.0  # of each run
DRIVER_CPU, SERVER_CPU = 0, (os.cpu_count() or 1) - 1
DAEMON = "qemu-storage-daemon"
SHAPES = (  # name, depth, bytes of a request, sequential
    ("4 KiB random reads, depth 1", 1, 4096, False),
    ("4 KiB random reads, depth 32", 32, 4096, False),
    ("4 KiB random reads, depth 128", 128, 4096, False),
    ("128 KiB sequential reads, depth 16", 16, 128 << 10, True),
)
LOOP = "pread loop"

Serve = Callable[..., object]


def compared(own: str, servers: dict[str, Serve], runs: int) -> list[Row]:
    """Figures of ``own`` beside those of each other server, and of reading the file without any."""
    with _going_first(), tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch, "disk")
        _make_disk(disk)
        return [row for shape in SHAPES for row in _rows(own, servers, shape, disk, runs)]


@contextmanager
def _going_first() -> Iterator[None]:
    """Before whatever else runs on this machine: driver and servers alike, which inherit it."""
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pass
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, cpus)


def _make_disk(path: Path) -> None:
    """Each 4 KiB begins with the number of the block it is in, whatever the size of blocks is taken to be."""
    with path.open("wb") as file:
        for number in range(DISK_SIZE // 4096):
            file.write(number.to_bytes(8, "little").ljust(4096, b"."))
    path.read_bytes()


def _rows(
    own: str, kinds: dict[str, Serve], shape: tuple[str, int, int, bool], disk: Path, runs: int
) -> list[Row]:
    name, depth, size, sequential = shape
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for _ in range(runs):
        for kind, serve in kinds.items():
            rate, cost = _measure(serve, disk, depth, size, sequential)
            rates.setdefault(kind, []).append(rate)
            costs.setdefault(kind, []).append(cost)
        if sequential:
            rates.setdefault(LOOP, []).append(_plain(disk, size))
    best = max((kind for kind in kinds if kind != own), key=lambda kind: statistics.median(rates[kind]))
    rows = []
    if sequential:
        scaled = {kind: [rate * size / 1e9 if kind != LOOP else rate / 1e9 for rate in found]
                  for kind, found in rates.items()}  # fmt: skip
        rows.append(_more(name, "GB/s", scaled[own], best, scaled[best], 1))
        rows.append(_more(name, "GB/s", scaled[own], LOOP, scaled[LOOP], 0.95))
    else:
        thousands = {kind: [rate / 1000 for rate in found] for kind, found in rates.items()}
        rows += [
            _more(name, "k/s", thousands[own], kind, thousands[kind], 1) for kind in kinds if kind != own
        ]
    for kind in kinds:
        if kind != own:
            rows.append(_less(f"{name}, CPU of a request", "us", costs[own], kind, costs[kind]))
    return rows


def _more(metric: str, unit: str, own: list[float], peer_name: str, peer: list[float], goal: float) -> Row:
    mine, other = statistics.median(own), statistics.median(peer)
    ratio = mine / other
    verdict = f"{'reached' if ratio >= goal else 'missed'} (ratio {goal:g})"
    return Row(metric, unit, mine, other, peer_name, ratio, len(own), verdict)


def _less(metric: str, unit: str, own: list[float], peer_name: str, peer: list[float]) -> Row:
    mine, other = statistics.median(own), statistics.median(peer)
    ratio = other / mine if mine else 0.0
    return Row(metric, unit, mine, other, peer_name, ratio, len(own), "reached" if ratio >= 1 else "missed")


# -- one run ----------------------------------------------------------------------------------------


def _measure(serve: Serve, disk: Path, depth: int, size: int, sequential: bool) -> tuple[float, float]:
    """Requests a second, and microseconds of the server's CPU time for each."""
    from pileus.memory import GuestMemory, Region
    from pileus.testing._blk_load import BlkLoad

    fd = os.memfd_create("bench")
    os.ftruncate(fd, MEMORY_SIZE)
    region = Region(fd, MEMORY_SIZE)
    region.prefault()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    os.sched_setaffinity(0, {DRIVER_CPU})
    with GuestMemory([(0, region)]) as memory:
        load = BlkLoad(
            memory, kick, call, disk_size=DISK_SIZE, ring_size=RING_SIZE, depth=depth, block_size=size,
            sequential=sequential, numbered=size == 4096,
        )  # fmt: skip
        with serve(disk, memory, load, kick, call) as pid:  # type: ignore[attr-defined]
            load.run(SECONDS / 5)
            before = _cpu_seconds(pid)
            rate = load.run(SECONDS)
            cost = (_cpu_seconds(pid) - before) / load.requests * 1e6
    os.close(call)
    os.close(kick)
    return rate, cost


def _cpu_seconds(pid: int) -> float:
    """Of all its threads; by their nanoseconds, where ticks would be too coarse."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def engine(*, behind_iommu: bool = False) -> Serve:
    """The device of a VM, in a process by itself; ``behind_iommu``: each page mapped by itself, too."""

    @contextmanager
    def serve(disk: Path, memory, load, kick: int, call: int) -> Iterator[int]:  # type: ignore[no-untyped-def]
        from pileus.block.open import open_image
        from pileus.testing.memory import page_by_page
        from pileus.virtio.devices.blk import Blk

        ready = os.eventfd(0)
        pid = os.fork()
        if pid == 0:
            try:
                os.sched_setaffinity(0, {SERVER_CPU})
                image = open_image(os.fspath(disk), format="raw", readonly=True)
                device = Blk("disk", image, queue_size=RING_SIZE)
                iommu = page_by_page(MEMORY_SIZE) if behind_iommu else None
                (queue,) = device.queues
                os.dup2(kick, queue.kick_fd)
                queue.size, queue.call_fd = RING_SIZE, call
                queue.descriptors, queue.available, queue.used = load.descriptors, load.available, load.used
                queue.activate(memory, 1 << 28 | 1 << 29, iommu)
                device.driver_features = device.offered
                device.activate()
                os.eventfd_write(ready, 1)
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.eventfd_read(ready)
        os.close(ready)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    return serve


def behind_socket(command: Callable[[Path, Path], list[str]]) -> Serve:
    """A vhost-user back-end: ``command(disk, socket)`` starts it."""

    @contextmanager
    def serve(disk: Path, memory, load, kick: int, call: int) -> Iterator[int]:  # type: ignore[no-untyped-def]
        with tempfile.TemporaryDirectory() as scratch:
            socket = Path(scratch, "socket")
            words = ["taskset", "-c", str(SERVER_CPU), *command(disk, socket)]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
            try:
                front = VhostFront(socket, memory.regions[0][1].fd, MEMORY_SIZE)
                front.start_queue(0, RING_SIZE, (load.descriptors, load.available, load.used), kick, call)
                yield process.pid
                front.close()
            finally:
                process.kill()
                process.wait()

    return serve


def daemon(aio: str) -> Serve:
    """qemu-storage-daemon with one of its ways to read a file."""
    if not shutil.which(DAEMON):
        raise ScriptError(f"{DAEMON} is missing: scripts/setup bench installs it")
    return behind_socket(
        lambda disk, socket: [
            DAEMON,
            "--blockdev", f"driver=file,filename={disk},node-name=d0,aio={aio},read-only=on",
            "--object", "iothread,id=io0",
            "--export", "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,"
                        f"addr.path={socket},writable=off,iothread=io0",
        ]
    )  # fmt: skip


def _plain(disk: Path, size: int) -> float:
    from pileus.memory import GuestMemory, Region
    from pileus.testing._blk_load import read_plainly

    os.sched_setaffinity(0, {SERVER_CPU})
    fd = os.open(disk, os.O_RDONLY)
    memory_fd = os.memfd_create("bench")
    os.ftruncate(memory_fd, MEMORY_SIZE)
    try:
        with GuestMemory([(0, Region(memory_fd, MEMORY_SIZE))]) as memory:
            read_plainly(fd, memory, size, DISK_SIZE, SECONDS / 5)
            return read_plainly(fd, memory, size, DISK_SIZE, SECONDS)
    finally:
        os.close(fd)

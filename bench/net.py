"""virtio-net over a TAP: packets and bytes a second, and CPU per packet, beside QEMU and a bare loop.

Everything runs on this very host. A driver in another process (``parts/net_driver.py``) shares memory with
the device and blasts packets through its queues, for pileus and QEMU alike: QEMU's guest is a halted CPU, its
device is set up and kicked by the qtest protocol. The bare loop calls write or read on the same TAP, without
rings: the kernel's own share. All is in a network namespace of its own, where the stack drops each frame.

With few cores the driver, the sender and everybody else compete; CPU per packet bears that better than rates.
"""

import ctypes
import fcntl
import os
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.bench import Options, Row
from support.host import PYTHON, ROOT, ScriptError, say
from support.host import run as run_command

GOALS = ("bench",)
PARTS = ROOT / "bench" / "parts"
DRIVER = PARTS / "net_driver.py"
QEMU, LOOP = "QEMU", "bare loop"
SECONDS = 1.0
MEMORY = 64 << 20
INTERFACE = "bench0"
DEVICE_CPU, DRIVER_CPU = 0, 1
CLONE_NEWNET = 0x40000000

QUEUE_SIZE, RINGS = 256, 0x10000  # as in parts/net_driver.py
MMIO, MMIO_STRIDE, MMIO_COUNT, MAGIC = 0xFEB00000, 0x200, 8, 0x74726976  # of -M microvm
QUEUE_NOTIFY = 0x50
# Checksums, segmentation both ways, mergeable buffers; indirect descriptors and EVENT_IDX; VERSION_1.
FEATURES = (0x3000FFA3, 1)
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8  # <linux/if_tun.h>
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


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


def run(options: Options) -> list[Row]:
    if os.geteuid() != 0:
        raise ScriptError("making a network namespace and a TAP takes root")
    rows: list[Row] = []
    with _namespace():
        for case in CASES:
            rows += _rows(case, options.runs or 5)
    return rows


def _rows(case: Case, runs: int) -> list[Row]:
    measures: dict[str, Callable[[Case], Figure]] = {"pileus": _pileus, QEMU: _qemu}
    if case.mode != "rr":
        measures[LOOP] = _loop
    figures: dict[str, list[Figure]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            figure = measure(case)
            if figure.packets:
                figures[name].append(figure)
            else:
                say(f"{case.name}, {name}: starved, a run moved no packet and does not count")
    if starved := [name for name, kept in figures.items() if not kept]:
        raise ScriptError(
            f"{case.name}: no run of {' and '.join(starved)} moved a packet: is this machine busy?"
        )
    rows = []
    for peer in list(measures)[1:]:
        own, other = figures["pileus"], figures[peer]
        goal = 1.0 if peer == QEMU and case.mode != "rr" else 0.0
        rows.append(_more(f"{case.name}, rate", "k/s", _rates(own), peer, _rates(other), goal))
        if case.gso:
            gigabytes = case.length / 1e6
            own_bytes, other_bytes = ([rate * gigabytes for rate in _rates(each)] for each in (own, other))
            rows.append(_more(f"{case.name}, bytes", "GB/s", own_bytes, peer, other_bytes, goal))
        rows.append(_less(f"{case.name}, CPU each", "us", _costs(own), peer, _costs(other), goal))
    return rows


def _rates(figures: list[Figure]) -> list[float]:
    return [figure.rate / 1e3 for figure in figures]


def _costs(figures: list[Figure]) -> list[float]:
    return [figure.cost * 1e6 for figure in figures]


def _more(metric: str, unit: str, own: list[float], peer: str, other: list[float], goal: float) -> Row:
    mine, theirs = statistics.median(own), statistics.median(other)
    return _row(metric, unit, mine, peer, theirs, mine / theirs, len(own), goal)


def _less(metric: str, unit: str, own: list[float], peer: str, other: list[float], goal: float) -> Row:
    mine, theirs = statistics.median(own), statistics.median(other)
    return _row(metric, unit, mine, peer, theirs, theirs / mine, len(own), goal)


def _row(
    metric: str, unit: str, own: float, peer: str, other: float, ratio: float, runs: int, goal: float
) -> Row:
    verdict = f"{'reached' if ratio >= goal else 'missed'} (ratio {goal:g})" if goal else ""
    return Row(metric, unit, own, other, peer, ratio, runs, verdict)


# -- the host ------------------------------------------------------------------------------------------


@contextmanager
def _namespace() -> Iterator[None]:
    """This thread, and what it starts, in a network namespace that has the TAP and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise ScriptError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    try:
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
        run_command(["ip", "tuntap", "add", "name", INTERFACE, "mode", "tap"])
        run_command(["ip", "link", "set", INTERFACE, "up"])
        yield
    finally:
        libc.setns(before, CLONE_NEWNET)
        os.close(before)


@contextmanager
def _shared_memory() -> Iterator[int]:
    fd = os.memfd_create("bench-net")
    try:
        os.ftruncate(fd, MEMORY)
        os.set_inheritable(fd, True)
        yield fd
    finally:
        os.close(fd)


def _driver(case: Case, fd: int, kick: int, text: str) -> subprocess.Popen[bytes]:
    words = [case.mode, fd, kick, kick, text, INTERFACE, case.length, case.gso, SECONDS]
    return _python(DRIVER_CPU, DRIVER, *words)


def _python(cpu: int, script: Path, *words: object) -> subprocess.Popen[bytes]:
    """A part of this benchmark, pinned to ``cpu``, with the descriptors it inherits."""
    command = ["taskset", "-c", str(cpu), str(PYTHON), str(script), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, close_fds=False, env=environment)


def _measure(driver: subprocess.Popen[bytes], device: int) -> Figure:
    """Wait for the driver's figures; ``device`` is the process whose CPU time counts."""
    _expect(driver, b"go\n")
    assert driver.stdout
    before = _cpu_seconds(device)
    packets, seconds = driver.stdout.readline().split()
    cpu = _cpu_seconds(device) - before
    driver.wait()
    return Figure(int(packets), float(seconds), cpu)


def _expect(driver: subprocess.Popen[bytes], line: bytes) -> None:
    assert driver.stdout
    if driver.stdout.readline() != line:
        raise ScriptError("the driver of the benchmark failed")


def _cpu_seconds(pid: int) -> float:
    """Of all threads, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


# -- pileus --------------------------------------------------------------------------------------------


def _pileus(case: Case) -> Figure:
    with _shared_memory() as fd:
        command = [str(PYTHON), str(PARTS / "net_backend.py"), str(fd), INTERFACE, str(DRIVER), case.mode]
        command += [str(case.length), str(case.gso), str(SECONDS)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        result = subprocess.run(
            command, stdout=subprocess.PIPE, close_fds=False, env=environment, check=True, timeout=60
        )
    packets, seconds, cpu = result.stdout.split()
    return Figure(int(packets), float(seconds), float(cpu))


# -- QEMU ----------------------------------------------------------------------------------------------


def _qemu(case: Case) -> Figure:
    with (
        tempfile.TemporaryDirectory() as scratch,
        _shared_memory() as fd,
        socket.socket(socket.AF_UNIX) as door,
    ):
        path = Path(scratch, "qtest")
        firmware = Path(scratch, "halt")
        firmware.write_bytes(b"\xfa\xf4\xeb\xfc" * 0x4000)  # cli; hlt; again: the CPU does nothing
        door.bind(str(path))
        door.listen()
        door.settimeout(20)
        process = subprocess.Popen(["taskset", "-c", str(DEVICE_CPU), *_qemu_command(path, firmware, fd)])
        try:
            qtest, _ = door.accept()
            with qtest:
                notify = _set_up(qtest)
                qtest.set_inheritable(True)
                return _measure(_driver(case, fd, qtest.fileno(), f"writel {notify:#x}"), process.pid)
        finally:
            process.kill()
            process.wait()


def _qemu_command(qtest: Path, firmware: Path, fd: int) -> list[str]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise ScriptError("no qemu-system-x86_64")
    memory = f"memory-backend-file,id=m,size={MEMORY},share=on,mem-path=/proc/{os.getpid()}/fd/{fd}"
    command = [program, "-M", "microvm,acpi=off,memory-backend=m", "-m", f"{MEMORY >> 20}M", "-accel", "tcg"]
    command += ["-bios", str(firmware), "-qtest", f"unix:{qtest}", "-qtest-log", "none"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-object", memory]
    command += ["-netdev", f"tap,id=n,ifname={INTERFACE},script=no,downscript=no,vhost=off"]
    command += ["-global", "virtio-mmio.force-legacy=false"]
    return [*command, "-device", "virtio-net-device,netdev=n,mac=2e:00:00:00:00:01"]


def _set_up(qtest: socket.socket) -> int:
    """Bring QEMU's device to DRIVER_OK with the features that it shares with ours; where it is kicked."""

    def ask(text: str) -> int:
        qtest.sendall(text.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += qtest.recv(4096)
        words = answer.split()
        if words[0] != b"OK":
            raise ScriptError(f"QEMU answers {answer.decode()} to {text}")
        return int(words[1], 16) if len(words) > 1 else 0

    bases = [MMIO + MMIO_STRIDE * index for index in range(MMIO_COUNT)]
    base = next(
        base for base in bases if ask(f"readl {base:#x}") == MAGIC and ask(f"readl {base + 8:#x}") == 1
    )

    def write(register: int, value: int) -> None:
        ask(f"writel {base + register:#x} {value:#x}")

    for status in (0, 1, 3):
        write(0x70, status)
    for word in (0, 1):
        write(0x14, word)
        offered = ask(f"readl {base + 0x10:#x}")
        write(0x24, word)
        write(0x20, offered & FEATURES[word])
    write(0x70, 11)
    if not ask(f"readl {base + 0x70:#x}") & 8:
        raise ScriptError("QEMU refuses the features")
    for index in (0, 1):
        write(0x30, index)
        write(0x38, QUEUE_SIZE)
        place = RINGS * (1 + index)
        for register, offset in ((0x80, 0), (0x90, 0x2000), (0xA0, 0x4000)):
            write(register, place + offset)
            write(register + 4, 0)
        write(0x44, 1)
    write(0x70, 15)
    return base + QUEUE_NOTIFY


# -- the kernel alone ----------------------------------------------------------------------------------


def _loop(case: Case) -> Figure:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        request = struct.pack("=16sH22x", INTERFACE.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(fd, TUNSETIFF, request)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", 12))
        fcntl.ioctl(fd, TUNSETOFFLOAD, 3)  # checksums, TSO4
        os.set_inheritable(fd, True)
        return _loop_rx(case, fd) if case.mode == "rx" else _loop_tx(case, fd)
    finally:
        os.close(fd)


def _loop_tx(case: Case, fd: int) -> Figure:
    driver = _driver(case._replace(mode="plain-tx"), fd, 0, "-")
    return _measure(driver, driver.pid)


def _loop_rx(case: Case, fd: int) -> Figure:
    with _shared_memory() as counter:
        words = ["plain-reader", fd, counter, 0, "-", INTERFACE, case.length, 0, 0]
        reader = _python(DEVICE_CPU, DRIVER, *words)
        try:
            _expect(reader, b"ready\n")
            return _measure(_driver(case._replace(mode="plain-rx"), counter, 0, "-"), reader.pid)
        finally:
            reader.kill()
            reader.wait()

"""Packets through pileus-net to a TAP, beside dpdk-testpmd that forwards between its vhost and TAP drivers.

testpmd polls: its CPU is all that there is, whatever it moves. Segmentation is pileus-net's alone here.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import if_nameindex

from support.bench import Options, Row
from support.foreign import LIBRARIES
from support.host import VENV, ScriptError
from support.host import run as run_command
from support.net_load import (
    CASES,
    DEVICE_CPU,
    DRIVER_CPU,
    FEATURES,
    INTERFACE,
    MEMORY,
    QUEUE_SIZE,
    RING_PARTS,
    RINGS,
    Case,
    Figure,
    driver,
    measure,
    namespace,
    rows,
    shared_memory,
)  # fmt: skip
from support.peers import PEERS
from support.vhost_front import VhostFront

GOALS = ("bench", "test")
OWN, TESTPMD = "pileus-net", "dpdk-testpmd"
PATIENCE = 20.0
MTU = 1500


def run(options: Options) -> list[Row]:
    if os.geteuid() != 0:
        raise ScriptError("making a network namespace and a TAP takes root")
    with namespace(tap=False):
        cases = [case for case in CASES if not case.gso]
        measures: dict[str, Callable[[Case], Figure]] = {
            OWN: lambda case: _measure(_own, case),
            TESTPMD: lambda case: _measure(_testpmd, case),
        }
        return [
            row
            for case in cases
            for row in rows(case, measures, {TESTPMD: 0.0 if case.mode == "rr" else 1.0}, options.runs or 3)
        ]


def _own(socket: Path) -> list[str]:
    backend = f"tap={INTERFACE},queue_size={QUEUE_SIZE}"
    return [
        "taskset",
        "-c",
        str(DEVICE_CPU),
        str(VENV / "bin" / OWN),
        "--backend",
        backend,
        "--socket",
        str(socket),
    ]


def _testpmd(socket: Path) -> list[str]:
    words = [
        str(PEERS / "bin" / TESTPMD),
        "-l",
        f"{DEVICE_CPU},{DRIVER_CPU}",
        "--main-lcore",
        str(DRIVER_CPU),
    ]
    words += ["--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--iova-mode=va"]
    words += [f"--file-prefix=bench{os.getpid()}"]
    for plugin in ("net_vhost", "net_tap", "mempool_ring"):
        words += ["-d", str(PEERS / LIBRARIES / f"librte_{plugin}.so.25")]
    words += [f"--vdev=net_vhost0,iface={socket},queues=1", f"--vdev=net_tap0,iface={INTERFACE}", "--"]
    words += [
        "--forward-mode=io",
        "--auto-start",
        "--nb-cores=1",
        "--total-num-mbufs=16384",
        "--stats-period=1000",
    ]
    return words


def _measure(command: Callable[[Path], list[str]], case: Case) -> Figure:
    kicks, calls = ([os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)] for _ in range(2))
    try:
        with shared_memory() as fd, _backend(command) as (pid, socket):
            features = FEATURES[0] | FEATURES[1] << 32
            front = VhostFront(socket, fd, MEMORY, features)
            for index in range(2):
                os.set_inheritable(kicks[index], True)
                places = [RINGS * (1 + index) + part for part in RING_PARTS]
                rings = (places[0], places[1], places[2])
                front.start_queue(index, QUEUE_SIZE, rings, kicks[index], calls[index])
            figure = measure(driver(case, fd, (kicks[0], kicks[1]), "-"), pid)
            front.close()
            return figure
    finally:
        for each in (*kicks, *calls):
            os.close(each)


@contextmanager
def _backend(command: Callable[[Path], list[str]]) -> Iterator[tuple[int, Path]]:
    """It serves the socket, and its TAP is up."""
    with tempfile.TemporaryDirectory() as scratch:
        socket = Path(scratch, "socket")
        process = subprocess.Popen(
            command(socket), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not (socket.exists() and INTERFACE in (name for _, name in if_nameindex())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ScriptError(f"{command(socket)[0]} serves nothing")
                time.sleep(0.01)
            run_command(["ip", "link", "set", INTERFACE, "mtu", str(MTU), "up"])
            yield process.pid, socket
        finally:
            process.terminate()
            process.wait()

"""Block requests: the engine in a process of its own, beside qemu-storage-daemon on the same rings."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bench import Options, Row
from support.block_load import DAEMON, RING_SIZE, SERVER_CPU, compared, daemon

GOALS = ("bench",)
OWN = "pileus"


def run(options: Options) -> list[Row]:
    servers = {OWN: _pileus, **{f"{DAEMON} {aio}": daemon(aio) for aio in ("threads", "io_uring")}}
    return compared(OWN, servers, options.runs or 5)


@contextmanager
def _pileus(disk: Path, memory, load, kick: int, call: int) -> Iterator[int]:  # type: ignore[no-untyped-def]
    from pileus.block.open import open_image
    from pileus.virtio.devices.blk import Blk

    ready = os.eventfd(0)
    pid = os.fork()
    if pid == 0:
        try:
            os.sched_setaffinity(0, {SERVER_CPU})
            device = Blk(
                "disk", open_image(os.fspath(disk), format="raw", readonly=True), queue_size=RING_SIZE
            )
            (queue,) = device.queues
            os.dup2(kick, queue.kick_fd)
            queue.size, queue.call_fd = RING_SIZE, call
            queue.descriptors, queue.available, queue.used = load.descriptors, load.available, load.used
            queue.activate(memory, 1 << 28 | 1 << 29)
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

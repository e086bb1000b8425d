"""Block requests to pileus-blk, beside qemu-storage-daemon in each of its ways to read a file.

But aio=native, which it refuses for files in the page cache.
"""

from pathlib import Path

from support.bench import Options, Row
from support.block_load import DAEMON, behind_socket, compared, daemon
from support.host import VENV

GOALS = ("bench",)
OWN = "pileus-blk"
AIOS = ("threads", "io_uring")


def run(options: Options) -> list[Row]:
    servers = {OWN: behind_socket(_command), **{f"{DAEMON} {aio}": daemon(aio) for aio in AIOS}}
    return compared(OWN, servers, options.runs or 5)


def _command(disk: Path, socket: Path) -> list[str]:
    backend = f"path={disk},image_type=raw,readonly=on"
    return [str(VENV / "bin" / OWN), "--backend", backend, "--socket", str(socket)]

"""Block requests: the engine in a process of its own, beside qemu-storage-daemon on the same rings."""

from support.bench import Options, Row
from support.block_load import DAEMON, compared, daemon, engine

GOALS = ("bench",)
OWN = "pileus"


def run(options: Options) -> list[Row]:
    servers = {OWN: engine(), **{f"{DAEMON} {aio}": daemon(aio) for aio in ("threads", "io_uring")}}
    return compared(OWN, servers, options.runs or 5)

"""When a program listens: its socket's file is there before that, between bind and listen."""

import subprocess
import time
from pathlib import Path

PATIENCE = 60.0  # seconds; machines may be busy
ACCEPTS = 1 << 16  # __SO_ACCEPTCON in /proc/net/unix


def await_listener(process: subprocess.Popen[bytes], socket: Path) -> None:
    """Return once ``process`` listens at ``socket``."""
    deadline = time.monotonic() + PATIENCE
    while not _listens(process.pid, socket):
        assert process.poll() is None, f"{process.args!r} ended: {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args!r} does not listen"
        time.sleep(0.01)


def _listens(pid: int, socket: Path) -> bool:
    """Whether anybody in the network namespace of ``pid`` does."""
    lines = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    # Num: RefCount Protocol Flags Type St Inode Path
    fields = [line.split(maxsplit=7) for line in lines]
    return any(int(each[3], 16) & ACCEPTS and each[7:] == [str(socket)] for each in fields)

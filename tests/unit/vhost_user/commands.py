"""The back-ends as processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.listening import PATIENCE, await_listener

ROOT = Path(__file__).parents[3]


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "bin" / name), *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


class Process:
    """``name`` with ``words``, which listens at ``socket``; ``kill`` and ``start`` it at will."""

    def __init__(self, name: str, words: Sequence[str], socket: Path) -> None:
        self.words = command(name, *words, "--socket", str(socket))
        self.socket = socket
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, env=environment())
        await_listener(self.process, self.socket)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """By SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

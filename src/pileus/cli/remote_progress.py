"""How far a long operation is, on a terminal, while another connection waits for its end."""

import sys
import threading
from types import TracebackType
from typing import Self

from pileus.cli import remote_tables as tables
from pileus.errors import PileusError
from pileus.sdk.client import Client

INTERVAL = 0.2  # seconds
BLANK = "\r\x1b[K"


class Progress:
    """Shows it on standard error while the block runs; nothing where that is no terminal."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.ident is not None:
            self._over.set()
            self._thread.join()
            sys.stderr.write(BLANK)

    def _show(self) -> None:
        while not self._over.wait(INTERVAL):
            try:
                operation = self._client.info().operation
            except PileusError:
                return  # who waits for the end tells of it
            if operation is not None:
                sys.stderr.write(f"{BLANK}{tables.progress(operation._asdict())}")
                sys.stderr.flush()

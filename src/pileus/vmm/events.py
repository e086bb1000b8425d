"""The event monitor: what happens to the VMM and its VM, as JSON to a file, a FIFO or a descriptor.

Imported only where one is asked for. Nobody waits for its reader: an event that finds no room is lost, and
what a guest can cause at will is written so often and no more. docs/api.md lists the events.
"""

import _thread
import json
import os
import stat
import time

from pileus import log
from pileus.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pileus.config.model import EventMonitorConfig

MODE = 0o600
BURST, PERIOD = 1000, 5.0  # events in seconds, of those that a guest causes
OF_GUESTS = ("virtio-device", "guest")  # such sources
NANO = 1_000_000_000


class EventMonitor:
    """Call it with source, event and properties, on any thread. Raises PileusError where it cannot write."""

    def __init__(self, config: "EventMonitorConfig") -> None:
        self._fd = _adopt(config.fd) if config.fd is not None else _open(config.path or "")
        self._began = time.monotonic_ns()
        self._lock = _thread.allocate_lock()
        self._rest = b""  # of an event that the reader has had a part of
        self._period = 0.0
        self._count = 0

    def __call__(self, source: str, event: str, properties: "dict[str, Any] | None" = None) -> None:
        nanoseconds = time.monotonic_ns() - self._began
        told = {
            "timestamp": {"secs": nanoseconds // NANO, "nanos": nanoseconds % NANO},
            "source": source,
            "event": event,
            "properties": properties,
        }
        with self._lock:
            if self._fd < 0 or (source in OF_GUESTS and self._too_many(nanoseconds / NANO)):
                return
            if not self._write(json.dumps(told, indent=2).encode() + b"\n\n"):
                log.limited(log.WARNING, f"the event monitor has no room for {source} {event}")

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _too_many(self, now: float) -> bool:
        if now - self._period >= PERIOD:
            self._period, self._count = now, 0
        self._count += 1
        return self._count > BURST

    def _write(self, data: bytes) -> bool:
        """Whether ``data`` is on its way, in whole or with a rest that goes first the next time."""
        try:
            if self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
            if self._rest:
                return False
            self._rest = data[os.write(self._fd, data) :]
        except OSError:  # no room, or no reader
            return False
        return True


def _adopt(fd: int) -> int:
    """The inherited descriptor ``fd``, which nobody waits for from now on."""
    try:
        os.set_blocking(fd, False)
        os.write(fd, b"")
        os.set_inheritable(fd, False)
    except OSError as error:
        raise ConfigError("--event-monitor fd", fd, "an open descriptor to write to is needed") from error
    return fd


def _open(path: str) -> int:
    """A file, emptied first; or a FIFO, whose reader may come later."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        if _is_fifo(path):
            return os.open(path, flags | os.O_RDWR)  # alone, O_WRONLY fails while there is no reader
        return os.open(path, flags | os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE)
    except OSError as error:
        raise HostError("write events to", path, error) from error


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        return False

"""Messages: one line each, to standard error or a file. A leaf, as cheap as a start needs it.

The levels say who should act: ``error`` what someone asked for did not happen, ``warning`` abnormal but
survived, ``info`` the VM's life, ``debug`` diagnosis, ``trace`` every step. A message that a guest or a peer
can cause at will goes through ``limited``. Nothing here raises but ``setup``.
"""

import os
import sys
import time

ERROR, WARNING, INFO, DEBUG, TRACE = range(5)
NAMES = ("ERROR", "WARN", "INFO", "DEBUG", "TRACE")
STDERR = 2
BURST, PERIOD = 10, 5.0  # ``limited`` lets through so many messages of one call site in so many seconds

level = ERROR
newline = "\n"  # what ends a line on a terminal: "\r\n" while one is in raw mode

_started = time.monotonic()
_fd = STDERR
_limits: "dict[tuple[str, int], _Limit]" = {}


def setup(verbosity: int, path: str | None = None) -> None:
    """Log up to level ``verbosity``; to a new file at ``path``, if one is named. Raises OSError."""
    global level, _fd  # noqa: PLW0603 - there is one log per process
    level = min(verbosity, TRACE)
    if path is not None:
        _fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)


def error(message: str) -> None:
    _write(ERROR, message, 2)


def warning(message: str) -> None:
    _write(WARNING, message, 2)


def info(message: str) -> None:
    _write(INFO, message, 2)


def debug(message: str) -> None:
    _write(DEBUG, message, 2)


def trace(message: str) -> None:
    _write(TRACE, message, 2)


def exception(error: BaseException) -> None:
    """A bug: the error with its traceback, at level error."""
    import traceback

    for line in "".join(traceback.format_exception(error)).splitlines():
        _write(ERROR, line, 2)


def limited(at: int, message: str) -> None:
    """Log at level ``at``, at most ``BURST`` times per ``PERIOD`` and call site; the rest is counted."""
    if at > level:
        return
    caller = sys._getframe(1)
    limit = _limits.setdefault((caller.f_code.co_filename, caller.f_lineno), _Limit())
    missed = limit.admit(time.monotonic())
    if missed is not None:
        _write(at, message + (f" ({missed} more like it were left out)" if missed else ""), 2)


def since_exec() -> float:
    """Seconds since the process began, to 10 ms; the clock of the lines starts later, with this module."""
    with open("/proc/self/stat", "rb") as stat:
        ticks = int(stat.read().rpartition(b")")[2].split()[19])  # proc(5): field 22, starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def one_line(text: str) -> str:
    """``text`` without characters that would end a line, or do worse to a terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class _Limit:
    """How many messages of a call site were let through and left out in the present period."""

    __slots__ = ("began", "missed", "passed")

    def __init__(self) -> None:
        self.began = -PERIOD
        self.passed = 0
        self.missed = 0

    def admit(self, now: float) -> int | None:
        """None to leave the message out; else how many were left out before it and not yet told."""
        if now - self.began >= PERIOD:
            self.began, self.passed = now, 0
        if self.passed == BURST:
            self.missed += 1
            return None
        self.passed += 1
        missed, self.missed = self.missed, 0
        return missed


def _write(at: int, message: str, depth: int) -> None:
    """One line in one write, from the caller ``depth`` frames up; lost where nobody can take it."""
    if at > level:
        return
    caller = sys._getframe(depth)
    file = caller.f_code.co_filename.rpartition("/pileus/")[2]
    when = time.monotonic() - _started
    line = f"pileus: {when:.6f}s: {NAMES[at]}:{file}:{caller.f_lineno} -- {one_line(message)}"
    try:
        os.write(_fd, (line + _line_end()).encode(errors="backslashreplace"))
    except OSError:
        pass


def _line_end() -> str:
    return newline if newline != "\n" and os.isatty(_fd) else "\n"

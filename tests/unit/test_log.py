"""Lines, levels and limits of the log."""

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus import log

LINE = re.compile(r"pileus: (\d+\.\d{6})s: ([A-Z]+):(\S+):(\d+) -- (.*)\n")


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Path]:
    """The log file, at level info."""
    path = tmp_path / "log"
    log.setup(log.INFO, str(path))
    yield path
    os.close(log._fd)
    log._fd, log.level, log.newline = log.STDERR, log.ERROR, "\n"
    log._limits.clear()


def texts(path: Path) -> list[str]:
    return [line[4] for line in LINE.findall(path.read_text())]


def test_a_line_tells_time_level_place_and_message(lines: Path) -> None:
    log.warning("serial0: half a byte")
    match = LINE.fullmatch(lines.read_text())
    assert match is not None
    assert float(match[1]) > 0
    assert match[2] == "WARN"
    assert match[3].endswith("test_log.py")
    assert match[5] == "serial0: half a byte"


def test_a_file_of_pileus_is_named_from_the_package_on(lines: Path) -> None:
    code = compile("log.error('x')", "/usr/lib/python3/pileus/vm/vm.py", "exec")
    exec(code, {"log": log})
    assert "ERROR:vm/vm.py:1 -- x\n" in lines.read_text()


def test_levels_above_the_asked_one_are_silent(lines: Path) -> None:
    for write in (log.error, log.warning, log.info, log.debug, log.trace):
        write(write.__name__)
    assert texts(lines) == ["error", "warning", "info"]
    log.setup(99)
    log.trace("trace")
    assert texts(lines)[-1] == "trace"


def test_a_message_stays_one_line(lines: Path) -> None:
    log.error("a\nb\r\x1b[2J é \udcff")
    assert texts(lines) == [r"a\nb\r\x1b[2J é \udcff"]


def test_an_exception_is_told_line_by_line(lines: Path) -> None:
    try:
        1 / 0  # noqa: B018 - raises
    except ZeroDivisionError as error:
        log.exception(error)
    assert texts(lines)[0].startswith("Traceback")
    assert texts(lines)[-1] == "ZeroDivisionError: division by zero"


def test_a_file_that_exists_is_emptied(tmp_path: Path, lines: Path) -> None:
    log.error("old")
    os.close(log._fd)
    log.setup(log.INFO, str(lines))
    assert lines.read_text() == ""


def test_setup_tells_of_a_file_it_cannot_make(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        log.setup(0, str(tmp_path / "none" / "log"))
    assert log._fd == log.STDERR


@pytest.mark.parametrize("path", ["/dev/full", "closed", "pipe"])
def test_a_log_that_cannot_be_written_is_nobody_s_problem(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(log, "_fd", {"/dev/full": full, "closed": 9999, "pipe": write_end}[path])
    log.error("lost")
    os.close(write_end)
    os.close(full)


def test_a_raw_terminal_gets_carriage_returns_and_a_file_does_not(
    lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.newline = "\r\n"
    log.error("x")
    assert lines.read_bytes().endswith(b"x\n")
    primary, secondary = os.openpty()
    with monkeypatch.context() as patch:
        patch.setattr(log, "_fd", secondary)
        log.error("x")
    assert os.read(primary, 1000).endswith(b"x\r\r\n")  # the terminal itself is not raw here
    os.close(primary)
    os.close(secondary)


def test_a_call_site_is_limited(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in range(25):
        log.limited(log.WARNING, f"bad {number}")
    log.limited(log.WARNING, "elsewhere")
    assert texts(lines) == [*(f"bad {number}" for number in range(10)), "elsewhere"]


def test_the_next_period_tells_what_was_left_out(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in range(27):
        now += log.PERIOD if number >= 25 else 0
        log.limited(log.WARNING, f"bad {number}")
    assert texts(lines)[10:] == ["bad 25 (15 more like it were left out)", "bad 26"]


def test_a_silent_level_costs_no_limit(lines: Path) -> None:
    log.limited(log.DEBUG, "x")
    assert log._limits == {}


def test_threads_write_whole_lines(lines: Path) -> None:
    def write(number: int) -> None:
        for _ in range(100):
            log.error(f"{number}" * 50)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts(lines)) == sorted(f"{number}" * 50 for number in range(4) for _ in range(100))


def test_the_process_is_older_than_its_log() -> None:
    assert log.since_exec() > 0
    assert log.since_exec() + 0.02 > time.monotonic() - log._started

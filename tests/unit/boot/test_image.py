import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pileus.boot.image import Image
from pileus.errors import ConfigError, HostError

Save = Callable[[bytes], str]


class Broken:
    """A memory whose file reads fail as told."""

    size = 1 << 20
    ranges = [(0, 1 << 20)]  # noqa: RUF012

    def __init__(self, error: Exception) -> None:
        self._error = error

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        raise AssertionError

    def load_file(self, gpa: int, fd: int, offset: int, length: int) -> None:
        raise self._error


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(path: object) -> str:
    before = open_fds()
    with pytest.raises(ConfigError) as caught:
        Image("--kernel", str(path))
    assert open_fds() == before
    assert str(caught.value).startswith(f"--kernel {path}: ")
    return caught.value.allowed


def test_reads_headers_and_closes_the_file(save: Save) -> None:
    before = open_fds()
    with Image("--kernel", save(b"0123456789")) as image:
        assert image.size == 10
        assert image.read(3, 4) == b"3456"
    assert open_fds() == before


def test_a_file_that_ends_too_early_is_truncated(save: Save) -> None:
    with Image("--kernel", save(b"0123456789")) as image, pytest.raises(ConfigError, match="truncated"):
        image.read(8, 3)


def test_a_file_cut_off_after_it_was_opened_is_refused(save: Save) -> None:
    path = save(b"0123456789")
    with Image("--kernel", path) as image:
        os.truncate(path, 5)
        with pytest.raises(ConfigError, match="shorter"):
            image.read(0, 10)


def test_an_empty_file_is_refused(save: Save) -> None:
    assert refused(save(b"")) == "is empty"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == "cannot be opened: No such file or directory"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "directory" in refused(tmp_path)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "FIFO" in refused(tmp_path / "fifo")


def test_a_device_is_refused() -> None:
    assert "device" in refused("/dev/zero")


def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "cannot be opened" in refused(tmp_path / "socket")


@pytest.mark.parametrize("path", ["", "a" * 5000, "a\0b", "\udcff\ud800"], ids=ascii)
def test_an_impossible_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        Image("--kernel", path)


def test_an_unreadable_file_is_refused(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:  # root may read every file, so no mode would do
        raise PermissionError(13, "Permission denied")

    path = save(b"data")
    monkeypatch.setattr(os, "open", refuse)
    assert refused(path) == "cannot be opened: Permission denied"


def test_a_read_error_of_the_host_is_a_host_error(save: Save) -> None:
    with Image("--kernel", save(b"data")) as image, pytest.raises(HostError, match="Input/output error"):
        image.load(Broken(OSError(5, "EIO")), 0, 0, 4)


def test_a_file_cut_off_while_it_is_loaded_is_refused(save: Save) -> None:
    with Image("--kernel", save(b"data")) as image, pytest.raises(ConfigError, match="shorter"):
        image.load(Broken(EOFError()), 0, 0, 4)

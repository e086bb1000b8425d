"""pileus-fs behind the front-end of shared directories, with a window for files (DAX)."""

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pileus.fs import abi
from pileus.loop import Loop
from pileus.testing import FakeDriver
from pileus.vhost_user.connection import Client as Connector
from pileus.vhost_user.devices.fs import VhostUserFs
from tests.unit.fs.client import Client

from .commands import Process, command, environment
from .test_backend import driving

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture
def backend(tmp_path: Path, folder: Path) -> Iterator[Process]:
    words = ["--backend", f"path={folder},cache_size={SIZE}"]
    with Process("pileus-fs", words, tmp_path / "socket") as backend:
        yield backend


def fs(socket: Path, cache_size: int) -> Callable[[Loop], VhostUserFs]:
    return lambda loop: VhostUserFs(
        "fs0", "--fs", Connector(str(socket)), loop, tag="shared", queue_size=128, cache_size=cache_size
    )


def shown(driver: FakeDriver, offset: int, length: int) -> bytes:
    """What the guest would see in the window."""
    assert isinstance(driver.device, VhostUserFs)
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(driver.device.windows[0].hva + offset)
        return memory.read(length)


def show(client: Client, node: int, at: int, length: int, offset: int, flags: int = 0) -> None:
    client.ask(abi.SETUPMAPPING, node, abi.SETUPMAPPING_IN.pack(abi.NO_HANDLE, at, length, flags, offset))


def test_files_go_both_ways(backend: Process, folder: Path) -> None:
    (folder / "greeting").write_text("hello")
    with driving(fs(backend.socket, 0)) as driver:
        client = Client(driver)
        assert not client.begin() & abi.MAP_ALIGNMENT
        assert client.read(client.open(client.look_up("greeting").id), 10) == b"hello"
        _, handle = client.create("answer", mode=0o666)
        client.write(handle, b"x" * 50000)
        assert (folder / "answer").read_bytes() == b"x" * 50000
        assert (folder / "answer").stat().st_mode & 0o777 == 0o666
    assert backend.end() == 0


def test_files_appear_in_the_window_and_go(backend: Process, folder: Path) -> None:
    data = os.urandom(64 * KIB)
    (folder / "file").write_bytes(data)
    with driving(fs(backend.socket, 1 * MIB)) as driver:
        client = Client(driver)
        assert client.begin() & abi.MAP_ALIGNMENT
        node = client.look_up("file").id
        show(client, node, 0, 64 * KIB, 128 * KIB)
        assert shown(driver, 128 * KIB, 64 * KIB) == data
        show(client, node, 32 * KIB, 4 * KIB, 0, abi.MAPPING_WRITE)
        assert shown(driver, 0, 4 * KIB) == data[32 * KIB : 36 * KIB]
        (folder / "file").write_bytes(b"y" * 64 * KIB)
        assert shown(driver, 0, 4 * KIB) == b"y" * 4 * KIB
        body = abi.REMOVEMAPPING_IN.pack(1) + abi.REMOVEMAPPING_ONE.pack(0, 4 * KIB)
        client.ask(abi.REMOVEMAPPING, node, body)
        assert shown(driver, 0, 4 * KIB) == bytes(4 * KIB)
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            show(client, node, 0, 64 * KIB, 1 * MIB - 4 * KIB)
        driver.start()
        assert shown(driver, 128 * KIB, 64 * KIB) == bytes(64 * KIB)
        assert client.begin() & abi.MAP_ALIGNMENT


def test_the_window_is_no_larger_than_either_wants(backend: Process) -> None:
    for wanted, size in ((64 * MIB, SIZE), (1 * MIB, 1 * MIB)):
        with driving(fs(backend.socket, wanted)) as driver:
            assert isinstance(driver.device, VhostUserFs)
            assert [window.size for window in driver.device.windows] == [size]


def test_another_process_takes_up_after_one_that_was_killed(backend: Process, folder: Path) -> None:
    (folder / "file").write_bytes(b"text" * KIB)
    with driving(fs(backend.socket, 1 * MIB)) as driver:
        client = Client(driver)
        client.begin()
        show(client, client.look_up("file").id, 0, 4 * KIB, 0)
        backend.kill()
        backend.start()
        client.begin()
        assert shown(driver, 0, 4) == b"text"
        assert client.look_up("file").about.size == 4 * KIB


def test_what_cannot_be_shared_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for words, sentence in {
        ("--socket", "/x"): "--backend is missing: path= of a directory is needed",
        ("--socket", "/x", "--backend", "path=/nope"): "cannot share /nope: No such file or directory",
        ("--socket", "/x", "--backend", "path=/etc/passwd"): "cannot share /etc/passwd: Not a directory",
        ("--socket", "/x", "--backend", "path=/,cache_size=5K"): "cache_size is a power of two",
        ("--socket", "/x", "--backend", "path=/,uid_map=1:2"): "GUEST:HOST:COUNT",
        ("--socket", "/x", "--backend", "path=/,cache=maybe"): "auto, always or never",
    }.items():
        done = subprocess.run(
            command("pileus-fs", *words), env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert re.fullmatch(r"pileus-fs: .*\n", done.stderr)
        assert sentence in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to give up")
def test_it_keeps_the_capabilities_of_a_file_server_only(backend: Process) -> None:
    status = Path(f"/proc/{backend.process.pid}/status").read_text()
    effective = int(re.search(r"CapEff:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    assert effective == 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31
    assert "NoNewPrivs:\t1" in status

"""The front-end of shared directories against virtiofsd of Debian 13."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.testing import FakeDriver
from pileus.vhost_user.connection import Client
from pileus.vhost_user.devices.fs import VhostUserFs
from tests.peer.vhost_user import PROGRAMS, Backend, driving, missing

pytestmark = [
    pytest.mark.skipif(missing("virtiofsd"), reason="no virtiofsd: run scripts/setup test"),
    pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd serves as root only"),
]

HIPRIO, REQUESTS = 0, 1
IN_HEADER = struct.Struct("<IIQQIIIHH")  # fuse_in_header of <linux/fuse.h>
OUT_HEADER = struct.Struct("<IiQ")
INIT_IN = struct.Struct("<IIII")
LOOKUP, GETATTR, OPEN, READ, INIT, FORGET = 1, 3, 14, 15, 26, 2
ROOT_NODE = 1
OUT_SIZE = 4096


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "greeting").write_bytes(b"hello, guest\n" * 100)
    return folder


@pytest.fixture
def driver(tmp_path: Path, shared: Path) -> Iterator[FakeDriver]:
    socket = tmp_path / "socket"
    words = [str(PROGRAMS / "virtiofsd"), "--socket-path", str(socket), "--shared-dir", str(shared)]
    with Backend([*words, "--sandbox", "none", "--seccomp", "none", "--log-level", "error"], socket):
        client = Client(str(socket))
        with driving(lambda loop: VhostUserFs("fs0", "--fs", client, loop, tag="shared")) as driver:
            yield driver


def ask(driver: FakeDriver, operation: int, node: int, body: bytes, size: int = OUT_SIZE) -> bytes:
    """The body of the answer to a FUSE request."""
    header = IN_HEADER.pack(IN_HEADER.size + len(body), operation, 7, node, 0, 0, 0, 0, 0)
    head = driver.add([header, body], [OUT_HEADER.size, size], queue=REQUESTS)
    driver.kick(REQUESTS)
    driver.wait(REQUESTS)
    answer = driver.read(head, REQUESTS)
    length, error, unique = OUT_HEADER.unpack_from(answer)
    assert (error, unique) == (0, 7)
    return answer[OUT_HEADER.size : length]


def begin(driver: FakeDriver) -> tuple[int, int]:
    major, minor = struct.unpack_from("<II", ask(driver, INIT, 0, INIT_IN.pack(7, 31, 65536, 0)))
    return major, minor


def test_a_session_begins(driver: FakeDriver) -> None:
    assert begin(driver)[0] == 7


def test_a_file_is_read(driver: FakeDriver, shared: Path) -> None:
    begin(driver)
    node = struct.unpack_from("<Q", ask(driver, LOOKUP, ROOT_NODE, b"greeting\0"))[0]
    handle = struct.unpack_from("<Q", ask(driver, OPEN, node, struct.pack("<II", os.O_RDONLY, 0)))[0]
    body = struct.pack("<QQIIQII", handle, 0, OUT_SIZE, 0, 0, 0, 0)
    assert ask(driver, READ, node, body) == (shared / "greeting").read_bytes()


def test_a_new_driver_begins_a_new_session(driver: FakeDriver) -> None:
    begin(driver)
    driver.start()
    assert begin(driver)[0] == 7

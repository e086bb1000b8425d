"""The front-end of disks against qemu-storage-daemon."""

import random
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.testing import FakeDriver
from pileus.vhost_user.connection import Client
from pileus.vhost_user.devices.blk import VhostUserBlk
from pileus.virtio import status
from tests.peer.vhost_user import Backend, driving

DAEMON = "qemu-storage-daemon"
pytestmark = pytest.mark.skipif(shutil.which(DAEMON) is None, reason=f"no {DAEMON}: run scripts/setup test")

MIB = 1 << 20
SIZE = 64 * MIB
SECTOR = 512
BLOCK = 4096
QUEUES = 4
IN, OUT, FLUSH = 0, 1, 4
HEADER = struct.Struct("<IIQ")
OK = b"\0"


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    disk, socket = tmp_path / "disk", tmp_path / "socket"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    command = [
        DAEMON, "--blockdev", f"driver=file,filename={disk},node-name=d0,aio=threads",
        "--object", "iothread,id=io0", "--export",
        f"type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={socket},writable=on"
        f",iothread=io0,num-queues={QUEUES}",
    ]  # fmt: skip
    with Backend(command, socket) as backend:
        yield backend


@pytest.fixture
def driver(backend: Backend) -> Iterator[FakeDriver]:
    client = Client(str(backend.socket))
    with driving(lambda loop: VhostUserBlk("blk0", "--disk", client, loop, num_queues=QUEUES)) as driver:
        yield driver


def request(
    driver: FakeDriver, kind: int, sector: int = 0, data: bytes = b"", length: int = 0, queue: int = 0
) -> tuple[bytes, bytes]:
    """The status and what was read."""
    readable = [HEADER.pack(kind, 0, sector), *([data] if data else [])]
    head = driver.add(readable, [*([length] if length else []), 1], queue=queue)
    driver.kick(queue)
    driver.wait(queue, timeout=30)
    answer = driver.read(head, queue)
    return answer[-1:], answer[:-1]


def test_the_configuration_is_the_daemon_s(driver: FakeDriver) -> None:
    assert struct.unpack("<Q", driver.read_config(0, 8))[0] == SIZE // SECTOR
    assert struct.unpack("<H", driver.read_config(34, 2))[0] == QUEUES
    assert driver.status & status.NEEDS_RESET == 0


def test_what_one_queue_wrote_another_reads(driver: FakeDriver) -> None:
    for index in range(40):
        data = bytes([index + 1]) * BLOCK
        assert request(driver, OUT, index * 8, data, queue=index % QUEUES)[0] == OK
    assert request(driver, FLUSH)[0] == OK
    for index in range(40):
        found = request(driver, IN, index * 8, length=BLOCK, queue=(index + 1) % QUEUES)
        assert found == (OK, bytes([index + 1]) * BLOCK)


def test_it_goes_on_after_a_driver_s_reset(driver: FakeDriver) -> None:
    assert request(driver, OUT, 8, b"x" * SECTOR)[0] == OK
    for _ in range(3):
        driver.start()
        assert request(driver, IN, 8, length=SECTOR, queue=3) == (OK, b"x" * SECTOR)


def test_it_goes_on_after_its_state_was_saved(driver: FakeDriver) -> None:
    for index in range(5):
        assert request(driver, OUT, index, b"x" * SECTOR)[0] == OK
    saved = driver.control.state()["queues"]
    assert [queue["next_avail"] for queue in saved] == [5, 0, 0, 0]
    assert request(driver, IN, 3, length=SECTOR) == (OK, b"x" * SECTOR)


def pattern(block: int, count: int) -> bytes:
    return struct.pack("<II", block, count) * (BLOCK // 8)


class Writer(threading.Thread):
    """Keeps a write under way in each queue: more than one the daemon, which keeps no inflight region, may
    lose when it is killed (what completes out of order cannot be told from the rings).
    """

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__()
        self.driver = driver
        self.written: dict[int, int] = {}  # block -> count, as acknowledged
        self.rounds = 0
        self.over = False

    def run(self) -> None:
        chance = random.Random(4)
        while not self.over:
            blocks = [chance.randrange(64) * QUEUES + queue for queue in range(QUEUES)]
            heads = []
            for queue, block in enumerate(blocks):
                header = HEADER.pack(OUT, 0, block * 8)
                heads.append(self.driver.add([header, pattern(block, self.rounds)], [1], queue=queue))
                self.driver.kick(queue)
            for queue, (head, block) in enumerate(zip(heads, blocks, strict=True)):
                self.driver.wait(queue, timeout=30)
                assert self.driver.read(head, queue) == OK
                self.written[block] = self.rounds
            self.rounds += 1


def test_killing_the_daemon_in_the_middle_of_writes_loses_nothing(
    backend: Backend, driver: FakeDriver
) -> None:
    chance = random.Random(5)
    writer = Writer(driver)
    writer.start()
    for _ in range(10):
        time.sleep(chance.uniform(0.02, 0.2))
        backend.kill()
        backend.start()
    before = writer.rounds
    deadline = time.monotonic() + 30
    while writer.rounds < before + 2 and writer.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.over = True
    writer.join(60)
    assert not writer.is_alive()
    assert writer.rounds > before
    assert len(writer.written) > 10
    for block, count in writer.written.items():
        assert request(driver, IN, block * 8, length=BLOCK) == (OK, pattern(block, count))
    assert driver.status & status.NEEDS_RESET == 0

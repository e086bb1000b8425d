"""Devices served over vhost-user: by our own front-end, and message by message."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pileus.config.model import DiskConfig
from pileus.errors import HostError
from pileus.loop import Loop
from pileus.testing import FakeDriver
from pileus.vhost_user import protocol
from pileus.vhost_user.connection import Client
from pileus.vhost_user.devices.blk import VhostUserBlk
from pileus.vhost_user.devices.device import VhostUserDevice
from pileus.vhost_user.frontend import UNDERSTOOD, Frontend
from pileus.virtio import status
from pileus.virtio.device import VirtioDevice
from pileus.virtio.devices.blk import open_disk
from tests.unit.virtio.devices.disks import FLUSH, OK, SECTOR, Disk, header

from .serving import PATIENCE, Echo, Serving

MIB = 1 << 20


class Front(VhostUserDevice):
    """Whatever has two queues."""

    id = 42
    queue_sizes = (64, 64)

    def refresh(self, frontend: Frontend) -> bytes:
        return frontend.config(8)


@contextmanager
def driving(make: Callable[[Loop], VhostUserDevice], **about: object) -> Iterator[FakeDriver]:
    """The driver of a front-end's device, whose loop turns on a thread of its own."""
    loop = Loop()
    thread = threading.Thread(target=loop.run)
    driver = FakeDriver(make(loop), shared=True, **about)  # type: ignore[arg-type]
    thread.start()
    try:
        yield driver
    finally:
        loop.post(loop.stop)
        thread.join(PATIENCE)
        driver.close()
        loop.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def echo(path: str) -> Iterator[Echo]:
    device = Echo()
    with Serving(device, path):
        yield device


def front(path: str) -> Callable[[Loop], VhostUserDevice]:
    return lambda loop: Front("front0", "--option", Client(path), loop)


def ask(driver: FakeDriver, text: bytes, queue: int = 0) -> bytes:
    head = driver.add([text], [len(text)], queue=queue)
    driver.kick(queue)
    driver.wait(queue)
    return driver.read(head, queue)


# -- a device in plain Python ---------------------------------------------------------------------


def test_a_driver_reaches_a_device_through_both_halves(path: str, echo: Echo) -> None:
    with driving(front(path)) as driver:
        for count in range(200):
            assert ask(driver, b"hello %d" % count, count % 2) == b"HELLO %d" % count
        assert driver.offered == Echo().offered
        assert driver.read_config() == bytes(range(8))


def test_front_ends_come_and_go(path: str, echo: Echo) -> None:
    for count in range(3):
        with driving(front(path)) as driver:
            assert ask(driver, b"again") == b"AGAIN"
        until(lambda: echo.memory is None)
        assert echo.resets >= count + 1


def test_a_driver_may_reset_and_start_again(path: str, echo: Echo) -> None:
    with driving(front(path)) as driver:
        for _ in range(3):
            assert ask(driver, b"one") == b"ONE"
            driver.start()


def test_a_ring_that_is_stopped_says_where_it_stands(path: str, echo: Echo) -> None:
    with driving(front(path)) as driver:
        for _ in range(5):
            ask(driver, b"x")
        assert [queue["next_avail"] for queue in driver.control.state()["queues"]] == [5, 0]
        assert ask(driver, b"on") == b"ON"


def test_a_new_configuration_reaches_the_driver(path: str, echo: Echo) -> None:
    with driving(front(path)) as driver:
        echo.reconfigure(b"changed!")
        until(lambda: driver.config_interrupts)
        assert driver.read_config() == b"changed!"


def test_a_driver_that_breaks_a_rule_stops_the_device_until_its_reset(path: str, echo: Echo) -> None:
    with driving(front(path)) as driver:
        driver.write_descriptor(0, gpa=FakeDriver.RAM_SIZE, length=1)
        driver.offer(0)
        driver.kick()
        until(lambda: echo.failed)
        driver.start()
        assert ask(driver, b"better") == b"BETTER"


def test_rings_too_large_or_in_high_memory_are_found(path: str, echo: Echo) -> None:
    high = [(0, MIB), (1 << 32, 4 * MIB), (1 << 40, MIB)]
    with driving(front(path), ranges=high[1:]) as driver:
        assert ask(driver, b"high") == b"HIGH"


# -- a disk ---------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return path


def blk(path: str, num_queues: int = 1) -> Callable[[Loop], VhostUserDevice]:
    return lambda loop: VhostUserBlk("front0", "--disk", Client(path), loop, num_queues=num_queues)


def disk_device(image: Path, **about: object) -> VirtioDevice:
    return open_disk(DiskConfig(path=str(image), image_type="raw", **about), 0)  # type: ignore[arg-type]


def test_a_disk_of_four_queues_keeps_what_is_written(path: str, image: Path) -> None:
    with Serving(disk_device(image, num_queues=4), path), driving(blk(path, num_queues=4)) as driver:
        disk = Disk(driver)
        for sector in range(64):
            assert disk.write(sector, bytes([sector]) * SECTOR, queue=sector % 4) == OK
        assert disk.request(header(FLUSH))[0] == OK
        for sector in range(64):
            assert disk.read(sector, SECTOR, queue=(sector + 1) % 4) == bytes([sector]) * SECTOR
    assert image.read_bytes()[: 2 * SECTOR] == bytes(SECTOR) + b"\1" * SECTOR


def test_the_write_cache_stays_off_across_a_stop(path: str, image: Path) -> None:
    device = disk_device(image)
    with Serving(device, path), driving(blk(path)) as driver:
        driver.write_config(32, b"\0")
        until(lambda: device.config[32] == 0)
        driver.control.state()  # takes the rings back and starts them again
        assert device.config[32] == 0
        assert Disk(driver).write(0, b"x" * SECTOR) == OK


def test_every_page_that_is_written_is_in_the_log(path: str, image: Path) -> None:
    image.write_bytes(b"y" * MIB)
    with Serving(disk_device(image), path), driving(blk(path)) as driver:
        size = FakeDriver.RAM_SIZE // 4096 // 8
        fd = os.memfd_create("log")
        os.ftruncate(fd, size)
        assert isinstance(driver.device, VhostUserDevice)
        frontend = driver.device._frontend
        assert frontend is not None
        disk = Disk(driver)
        disk.read(0, SECTOR)
        frontend.start_logging(fd, size)
        head = driver.add([header(0, 0)], [16384, 1])
        driver.kick()
        driver.wait()
        log = os.pread(fd, size, 0)
        dirty = {page for page in range(size * 8) if log[page // 8] >> page % 8 & 1}
        places = [(block.gpa, block.size) for block in driver.rings[0].blocks(head) if block.writable]
        places.append((driver.rings[0].used_ring, 6 + 8 * driver.rings[0].size))
        wanted = {
            page for gpa, length in places for page in range(gpa // 4096, (gpa + length - 1) // 4096 + 1)
        }
        assert wanted == dirty
        frontend.stop_logging()
        os.ftruncate(fd, 0)  # nobody writes there any more
        disk.read(0, SECTOR)
        os.close(fd)


def test_all_that_was_offered_is_agreed(path: str, image: Path) -> None:
    with Serving(disk_device(image), path), driving(blk(path)) as driver:
        assert isinstance(driver.device, VhostUserDevice)
        frontend = driver.device._frontend
        assert frontend is not None
        assert frontend.protocol_features == UNDERSTOOD
        assert frontend.features & protocol.LOG_ALL
        assert driver.status & status.NEEDS_RESET == 0


def test_memory_that_is_truncated_ends_the_conversation_and_no_more(path: str, echo: Echo) -> None:
    sock = Client(path).attempt()
    assert sock is not None
    with driving(front_of(sock)) as driver:
        region = driver.memory.regions[1][1]
        os.ftruncate(region.fd, 0)
        driver.write_descriptor(0, gpa=FakeDriver.HIGH_RAM, length=64)
        driver.offer(0)
        driver.kick()
        frontend = driver.device._frontend  # type: ignore[attr-defined]
        until(lambda: frontend is None or hung_up(frontend))
    with driving(front(path)) as driver:
        assert ask(driver, b"next") == b"NEXT"


def front_of(sock: socket.socket) -> Callable[[Loop], VhostUserDevice]:
    class Once:
        path = "here"

        def attempt(self) -> socket.socket | None:
            try:
                return sock.dup()
            except OSError:
                return None
            finally:
                sock.close()

        def last_words(self) -> str:
            return ""

        def close(self) -> None:
            pass

    return lambda loop: Front("front0", "--option", Once(), loop)


def hung_up(frontend: Frontend) -> bool:
    try:
        frontend._channel.allow(1)
        frontend.config(8)
    except HostError:
        return True
    return False


def test_the_configuration_is_told_in_parts(path: str, echo: Echo) -> None:
    sock = Client(path).attempt()
    assert sock is not None
    frontend = Frontend(sock, "it")
    frontend.negotiate()
    frontend.set_config(2, b"xy")
    assert frontend.config(8) == b"\0\1xy" + bytes(range(4, 8))
    assert struct.unpack("<H", frontend.config(2)) == (256,)
    frontend.close()

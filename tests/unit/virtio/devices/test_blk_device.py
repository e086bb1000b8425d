"""virtio-blk on a block device of the host: a loop device, which takes root to make."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pileus.block.open import open_image
from pileus.errors import HostError
from pileus.testing import FakeDriver
from pileus.virtio.devices.blk import Blk

from .disks import DISCARD, IOERR, OK, SECTOR, UNMAP, WRITE_ZEROES, Disk, header, segment

SIZE = 4 << 20
PIECE = 1 << 20
Attach = Callable[..., str]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="only root can make a loop device"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def attach(file: Path) -> Iterator[Attach]:
    """A function that makes a block device of ``file``."""
    made: list[str] = []

    def attach(*options: str) -> str:
        words = ["losetup", "--find", "--show", *options, str(file)]
        made.append(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip())
        return made[-1]

    yield attach
    for path in made:
        subprocess.run(["losetup", "--detach", path], check=True)


@pytest.fixture(params=["io_uring", "threads"])
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Disk]]:
    drivers: list[FakeDriver] = []

    def start(path: str, **how: bool) -> Disk:
        image = open_image(path, format="raw", **how)
        drivers.append(FakeDriver(Blk("disk", image, threads=request.param == "threads")))
        return Disk(drivers[-1])

    yield start
    for driver in drivers:
        driver.close()


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_data_is_read_written_and_flushed(
    attach: Attach, start: Callable[..., Disk], file: Path, direct: bool
) -> None:
    content = file.read_bytes()
    disk = start(attach(), direct=direct)
    assert disk.read(7, 8192) == content[7 * SECTOR :][:8192]
    assert disk.write(9, b"new!" * 1024) == OK
    assert disk.flush() == OK
    assert file.read_bytes() == content[: 9 * SECTOR] + b"new!" * 1024 + content[9 * SECTOR + 4096 :]


@pytest.mark.parametrize("size", [512, 4096])
def test_its_blocks_are_the_guest_s(attach: Attach, size: int) -> None:
    image = open_image(attach("--sector-size", str(size)), format="raw")
    try:
        assert (image.size, image.logical_block) == (SIZE, size)
        assert image.physical_block >= size
    finally:
        image.close()


def test_what_is_discarded_or_zeroed_frees_blocks_below(
    attach: Attach, start: Callable[..., Disk], file: Path
) -> None:
    disk = start(attach())
    before = file.stat().st_blocks
    assert disk.request(header(DISCARD) + segment(0, PIECE // SECTOR))[0] == OK
    assert disk.request(header(WRITE_ZEROES) + segment(PIECE // SECTOR, PIECE // SECTOR, UNMAP))[0] == OK
    assert disk.read(PIECE // SECTOR, PIECE) == bytes(PIECE)
    assert disk.flush() == OK
    assert before - file.stat().st_blocks >= PIECE // SECTOR


def test_a_device_that_can_only_be_read_is_opened_for_nothing_else(
    attach: Attach, start: Callable[..., Disk], file: Path
) -> None:
    content = file.read_bytes()
    path = attach("--read-only")
    with pytest.raises(HostError, match=f"cannot open {path}: .*readonly=on"):
        open_image(path, format="raw")
    disk = start(path, readonly=True)
    assert disk.read(0, SECTOR) == content[:SECTOR]
    assert disk.write(0, bytes(SECTOR)) == IOERR


def test_what_the_device_has_lost_is_an_error_of_that_request(
    attach: Attach, start: Callable[..., Disk], file: Path
) -> None:
    """The kernel gives EIO for a part of a device that is not there any more."""
    content = file.read_bytes()
    disk = start(attach(), direct=True)
    os.truncate(file, PIECE)
    status, _ = disk.request(header(0, 2 * PIECE // SECTOR), 4096)
    assert status == IOERR
    assert disk.read(0, 4096) == content[:4096]

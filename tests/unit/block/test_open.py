"""Opening images: what they look like, and what can be none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pileus import log
from pileus.block.open import open_image
from pileus.errors import ConfigError, HostError
from pileus.testing._image import ImageDriver

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="no qemu-img (package qemu-utils)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(1 << 16))
    return path


def make(path: Path, *words: str) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *words], cwd=path.parent, check=True, timeout=60
    )


@pytest.mark.parametrize("direct", [False, True])
def test_a_raw_image_is_what_looks_like_nothing_else(path: Path, direct: bool) -> None:
    with open_image(str(path), direct=direct) as image:
        assert (image.format, image.size, image.plain, image.readonly) == ("raw", 1 << 16, True, False)
        assert image.guarded >= 512
        assert image.logical_block in (512, 4096)
        assert image.physical_block == 4096
        assert image.can_discard


@pytest.mark.parametrize("direct", [False, True])
@needs_qemu_img
def test_a_qcow2_image_is_recognized_and_so_is_its_backing_file(
    tmp_path: Path, path: Path, direct: bool
) -> None:
    make(path, "-b", "disk", "-F", "raw", "top")
    with open_image(str(tmp_path / "top"), direct=direct) as image:
        assert (image.format, image.plain) == ("qcow2", False)
        assert ImageDriver(image).read(0, 1 << 16) == path.read_bytes()
        with pytest.raises(HostError, match="in use"):
            open_image(str(path))
        open_image(str(path), readonly=True).close()
    open_image(str(path)).close()


@needs_qemu_img
def test_an_image_said_to_be_raw_is_raw(tmp_path: Path, path: Path) -> None:
    make(path, "top", "1M")
    with open_image(str(tmp_path / "top"), format="raw") as image:
        assert image.format == "raw"
        assert image.guarded == 0


@needs_qemu_img
def test_a_backing_file_of_a_format_there_is_not(tmp_path: Path, path: Path) -> None:
    make(path, "-u", "-b", "disk", "-F", "vmdk", "top", "1M")
    with pytest.raises(HostError, match="vmdk"):
        open_image(str(tmp_path / "top"))
    open_image(str(tmp_path / "top"), format="raw").close()


def test_a_file_that_is_no_qcow2_cannot_be_opened_as_one(path: Path) -> None:
    with pytest.raises(HostError, match=str(path)):
        open_image(str(path), format="qcow2")
    open_image(str(path)).close()


def test_a_format_nobody_knows(path: Path) -> None:
    with pytest.raises(ConfigError, match="image_type vmdk: known are raw and qcow2"):
        open_image(str(path), format="vmdk")


def test_what_is_left_of_a_sector_is_left_out(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.truncate(path, 1000)
    log.setup(log.WARNING)
    try:
        with open_image(str(path)) as image:
            assert image.size == 512
    finally:
        log.setup(log.ERROR)
    assert "the last 488 bytes make no whole sector" in capfd.readouterr().err


def test_what_is_no_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("missing", "fifo", "."):
        with pytest.raises(HostError, match="cannot open"):
            open_image(str(tmp_path / name))
    with pytest.raises(HostError):
        open_image("/dev/zero", readonly=True)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("direct", [False, True])
def test_a_raw_image_reads_and_writes_bytes_at_any_place(path: Path, direct: bool) -> None:
    """As a device does, and as the image itself does, through buffers that O_DIRECT does not like."""
    model = bytearray(path.read_bytes())
    with open_image(str(path), format="raw", direct=direct) as image:
        driver = ImageDriver(image, by_image=True)
        for at, length in [(0, 512), (512, 4096), (1536, 70), (4095, 2), (12345, 10000), ((1 << 16) - 1, 1)]:
            driver.write(at, bytes([at & 255]) * length)
            model[at : at + length] = bytes([at & 255]) * length
            assert driver.read(at, length) == model[at : at + length]
        driver.write_zeroes(4096, 8192, unmap=True)
        driver.write_zeroes(20480, 4096, unmap=False)
        model[4096:12288], model[20480:24576] = bytes(8192), bytes(4096)
        driver.discard(8192, 4096)
        driver.flush()
        assert driver.read(0, 1 << 16) == model
    assert path.read_bytes() == model


@pytest.mark.parametrize("direct", [False, True])
def test_nothing_is_read_behind_the_end_of_a_file_that_shrank(path: Path, direct: bool) -> None:
    with open_image(str(path), direct=direct) as image:
        os.truncate(path, 4096)
        with pytest.raises(OSError, match="Input/output error"):
            ImageDriver(image, by_image=True).read(4096, 4096)
        with pytest.raises(OSError, match="Input/output error"):
            ImageDriver(image, by_image=True).read(4000, 1000)

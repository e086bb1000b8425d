"""QCOW2 images with flipped bytes: an error for each request that meets one, and nothing worse."""

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.errors import HostError
from pileus.testing._image import ImageDriver
from tests.peer.qemu_img import memory_folder, needs_qemu_img, qemu_img
from tests.unit.block.opening import open_image
from tests.unit.block.twin import Twin

pytestmark = needs_qemu_img

MIB = 1 << 20
IMAGES = 120  # of each kind
LIMIT = 20.0  # seconds that one image may take at the very most
VALUES = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x200,
    0x10000,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 55,
    1 << 56,
    1 << 62,
    1 << 63,
    2**64 - 1,
]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    yield from memory_folder(tmp_path)


def tables(twin: Twin) -> list[tuple[int, int]]:
    """Where the tables are: offset and size of what is worth spoiling."""
    found = [(0, 112), (0, 512), (twin.l1_offset, min(8 * twin.l1_size, 64)), (twin.table_offset, 64)]
    found += [(place, 64) for place in twin.numbers(twin.table_offset, 2) if place]
    found += [(entry & ((1 << 56) - 512), 512) for entry in twin.l1() if entry]
    (snapshots,) = struct.unpack_from(">Q", twin.data, 64)
    return [*found, (snapshots, 120)] if snapshots else found


def spoil(data: bytearray, places: list[tuple[int, int]], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        offset, size = rng.choice(places)
        width = rng.choice([1, 2, 4, 8])
        at = offset + rng.randrange(max(size // width, 1)) * width
        old = int.from_bytes(data[at : at + width], "big")
        value = rng.choice(
            [
                rng.choice(VALUES),
                old ^ 1 << rng.randrange(8 * width),
                old + rng.choice([-1, 1]),
                rng.getrandbits(64),
            ]
        )
        data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")


def use(path: Path, rng: random.Random) -> int:
    """Do some of everything; how many requests failed."""
    failed = 0
    readonly = rng.random() < 0.3
    with open_image(path, readonly=readonly) as image:
        driver = ImageDriver(image, by_image=rng.random() < 0.5)

        def write(at: int, length: int) -> None:
            driver.write(at, bytes(length))

        reach = min(image.size, 4 * MIB) // 512
        for _ in range(30):
            if not reach:
                break
            at = rng.randrange(reach)
            length = min(reach - at, rng.choice([1, 8, 300])) * 512
            at *= 512
            if rng.random() < 0.1:
                at = image.size - length
            work = rng.choice([driver.read, driver.discard, driver.write_zeroes, write])
            try:
                work(at, length)
                if rng.random() < 0.2:
                    driver.flush()
            except OSError:
                failed += 1
    return failed


@pytest.mark.parametrize(
    "option",
    ["cluster_size=4096", "cluster_size=65536,compat=0.10", "cluster_size=512,compression_type=zstd"],
)
def test_spoilt_images_do_no_harm(tmp_path: Path, option: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    raw, image, path = tmp_path / "raw", tmp_path / "image", tmp_path / "spoilt"
    raw.write_bytes(rng.randbytes(MIB // 2) + b"pileus! " * (MIB // 16) + bytes(MIB))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", option, raw, image)
    with open_image(image) as whole:
        ImageDriver(whole).write(MIB, rng.randbytes(MIB // 4))
    qemu_img("snapshot", "-c", "kept", image)
    with open_image(image) as whole:
        ImageDriver(whole).write(MIB, rng.randbytes(MIB // 8))
    sound, places = image.read_bytes(), tables(Twin(image))
    refused = failed = 0
    for _ in range(IMAGES):
        data = bytearray(sound)
        spoil(data, places, rng)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        started = time.monotonic()
        try:
            failed += use(path, rng)
        except HostError:
            refused += 1
        assert time.monotonic() - started < LIMIT
    assert refused
    assert failed

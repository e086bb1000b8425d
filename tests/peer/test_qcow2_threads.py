"""QCOW2 under several threads at once, and with more tables than are kept in memory."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.testing._image import ImageDriver
from tests.peer.qemu_img import check, holds, memory_folder, needs_qemu_img, qemu_img
from tests.unit.block.model import Model
from tests.unit.block.opening import open_image

pytestmark = needs_qemu_img

MIB, GIB = 1 << 20, 1 << 30
THREADS = 4


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    yield from memory_folder(tmp_path)


class Part(ImageDriver):
    """A stretch of an image, as a disk of its own."""

    start = 0

    def read(self, offset: int, length: int) -> bytes:
        return super().read(self.start + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        super().write(self.start + offset, data)

    def discard(self, offset: int, length: int) -> None:
        super().discard(self.start + offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool = True) -> None:
        super().write_zeroes(self.start + offset, length, unmap)


def together(works: list[threading.Thread], failures: list[BaseException]) -> None:
    for work in works:
        work.start()
    for work in works:
        work.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    "option", ["cluster_size=4096", "cluster_size=65536,compat=0.10", "cluster_size=512"]
)
def test_threads_do_not_meet(tmp_path: Path, option: str) -> None:
    """Each has a part of the disk that ends inside a cluster, over a snapshot and a backing file."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    path, base = tmp_path / "image", tmp_path / "base"
    size = 4 * MIB + 512 * 9
    part = size // THREADS // 512 * 512
    base.write_bytes(rng.randbytes(size - MIB))
    qemu_img("create", "-f", "qcow2", "-o", option, "-b", base, "-F", "raw", path, size)
    whole = Model(base.read_bytes().ljust(size, b"\0"), rng)
    with open_image(path) as image:
        for _ in range(20):
            whole.step(ImageDriver(image))
    qemu_img("snapshot", "-c", "kept", path)
    models = [
        Model(bytes(whole.data[part * index :][:part]), random.Random(seed + index))
        for index in range(THREADS)
    ]
    failures: list[BaseException] = []

    def work(model: Model, driver: ImageDriver) -> None:
        try:
            for _ in range(60):
                model.step(driver)
        except BaseException as error:
            failures.append(error)

    with open_image(path) as image:
        works = []
        for index, model in enumerate(models):
            driver = Part(image, by_image=index == 3)
            driver.start = part * index
            works.append(threading.Thread(target=work, args=(model, driver)))
        together(works, failures)
    for index, model in enumerate(models):
        whole.data[part * index : part * (index + 1)] = model.data
    check(path)
    holds(path, bytes(whole.data))


def test_tables_that_do_not_fit_in_memory_come_and_go(tmp_path: Path) -> None:
    """Disk addresses whose tables compete for eight places: a dirty one is written to make room."""
    path, stride, count = tmp_path / "image", 2 * GIB, 40
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4096", path, stride * count)
    failures: list[BaseException] = []

    def work(number: int, driver: ImageDriver) -> None:
        try:
            rng = random.Random(number)
            for _ in range(150):
                at = rng.randrange(count) * stride + number * 8192
                driver.write(at, at.to_bytes(8, "big") * 64)
                other = rng.randrange(count) * stride + rng.randrange(THREADS) * 8192
                assert driver.read(other, 512) in (bytes(512), other.to_bytes(8, "big") * 64)
                if rng.random() < 0.1:
                    driver.discard(other + 4096, 4096)
        except BaseException as error:
            failures.append(error)

    with open_image(path) as image:
        driver = ImageDriver(image)
        together(
            [threading.Thread(target=work, args=(number, driver)) for number in range(THREADS)], failures
        )
        written = [
            at
            for index in range(count)
            for part in range(THREADS)
            if any(driver.read(at := index * stride + part * 8192, 8))
        ]
    check(path)
    with open_image(path, readonly=True) as image:
        driver = ImageDriver(image)
        assert all(driver.read(at, 512) == at.to_bytes(8, "big") * 64 for at in written if at)

"""QCOW2 between qemu-img and pileus: each reads what the other wrote."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.errors import HostError
from pileus.testing._image import ImageDriver
from tests.peer.qemu_img import check, holds, memory_folder, needs_qemu_img, qemu_img
from tests.unit.block.model import Model
from tests.unit.block.opening import open_image

pytestmark = needs_qemu_img

KIB, MIB = 1 << 10, 1 << 20
KINDS = [
    {"cluster_size": 512, "compat": "1.1", "refcount_bits": 64},
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 1024, "compat": "1.1", "refcount_bits": 1},
    {"cluster_size": 4096, "compat": "1.1", "refcount_bits": 2},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "compat": "1.1", "refcount_bits": 4, "lazy_refcounts": "on"},
    {"cluster_size": 65536, "compat": "1.1"},
    {"cluster_size": 65536, "compat": "0.10"},
    {"cluster_size": 65536, "compat": "1.1", "preallocation": "metadata"},
    {"cluster_size": 262144, "compat": "1.1", "refcount_bits": 32},
    {"cluster_size": 2 * MIB, "compat": "1.1", "refcount_bits": 8},
]


def options(kind: dict[str, object]) -> list[str]:
    return ["-o", ",".join(f"{name}={value}" for name, value in kind.items())]


def names(kind: dict[str, object]) -> str:
    return " ".join(map(str, kind.values()))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    yield from memory_folder(tmp_path)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def lumpy(rng: random.Random, size: int) -> bytes:
    """Data as disks have it: random stretches, zeroes, and what compresses."""
    pieces: list[bytes] = []
    have = 0
    while have < size:
        length = rng.choice([512, 4096, 65536, 200_000])
        pieces.append(rng.choice([rng.randbytes(length), bytes(length), b"pileus! " * (length // 8)]))
        have += len(pieces[-1])
    return b"".join(pieces)[:size]


def work(path: Path, data: bytes, rng: random.Random, steps: int = 120) -> bytes:
    """Use the image that holds ``data``, opening it twice; what it holds in the end."""
    model = Model(data, rng)
    for by_image in (False, True):
        with open_image(path) as image:
            driver = ImageDriver(image, by_image)
            assert driver.read(0, len(data)) == model.data
            for _ in range(steps // 2):
                model.step(driver)
            assert driver.read(0, len(data)) == model.data
    return bytes(model.data)


@pytest.mark.parametrize(
    ("backed", "kind"),
    # qemu-img preallocates only what has no backing file.
    [
        (backed, kind)
        for kind in KINDS
        for backed in (False, True)
        if not (backed and "preallocation" in kind)
    ],
    ids=lambda value: names(value) if isinstance(value, dict) else "backed" if value else "alone",
)
def test_random_work_leaves_a_sound_image(
    tmp_path: Path, rng: random.Random, kind: dict[str, object], backed: bool
) -> None:
    path, base, size = tmp_path / "image", tmp_path / "base", 3 * MIB + 512 * rng.randrange(100)
    words: list[object] = []
    data = bytes(size)
    if backed:
        base.write_bytes(rng.randbytes(rng.choice([MIB, size, size + MIB])))
        data = base.read_bytes()[:size].ljust(size, b"\0")
        words = ["-b", base, "-F", "raw"]
    qemu_img("create", "-f", "qcow2", *options(kind), *words, path, size)
    data = work(path, data, rng)
    check(path)
    holds(path, data)


@pytest.mark.parametrize(
    "kind",
    [
        kind | also
        for kind in KINDS
        for also in ({}, {"compression_type": "zstd"})
        if "preallocation" not in kind and not (also and kind["compat"] == "0.10")
    ],
    ids=names,
)
def test_compressed_clusters_are_read_and_replaced(
    tmp_path: Path, rng: random.Random, kind: dict[str, object]
) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image"
    if kind.get("refcount_bits") == 1:
        kind = kind | {"refcount_bits": 16}  # compressed clusters share
    raw.write_bytes(data := lumpy(rng, 2 * MIB + 512 * 7))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *options(kind), raw, path)
    data = work(path, data, rng, 60)
    check(path)
    holds(path, data)


def test_the_tables_of_an_image_grow(tmp_path: Path) -> None:
    """Small clusters with wide refcounts: each 32 KiB take a block, each 2 MiB a cluster of the table."""
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, 24 * MIB)
    data = random.randbytes(24 * MIB)
    with open_image(path) as image:
        driver = ImageDriver(image)
        for at in range(0, len(data), 3 * MIB):
            driver.write(at, data[at : at + 3 * MIB])
    check(path)
    holds(path, data)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3], KINDS[6], KINDS[10]], ids=names)
def test_snapshots_keep_what_they_hold(tmp_path: Path, rng: random.Random, kind: dict[str, object]) -> None:
    """Refcounts of 2 bits allow three: the disk and two snapshots."""
    path, size = tmp_path / "image", 2 * MIB
    qemu_img("create", "-f", "qcow2", *options(kind), path, size)
    data, kept = bytes(size), {}
    for name in ("first", "second"):
        kept[name] = data = work(path, data, rng, 40)
        qemu_img("snapshot", "-c", name, path)
    data = work(path, data, rng)
    check(path)
    holds(path, data)
    for index, (name, then) in enumerate(kept.items(), 1):
        for wanted in (name, str(index)):
            with open_image(path, readonly=True, snapshot=wanted) as image:
                assert ImageDriver(image).read(0, size) == then
    with pytest.raises(HostError, match=r"no snapshot 'third'; there is 1 .first., 2 .second."):
        open_image(path, readonly=True, snapshot="third")
    with pytest.raises(HostError, match="only for reading"):
        open_image(path, snapshot="first")
    qemu_img("snapshot", "-d", "first", path)
    data = work(path, data, rng, 40)
    qemu_img("snapshot", "-a", "second", path)
    check(path)
    holds(path, kept["second"])


def test_a_chain_of_images_reads_as_one(tmp_path: Path, rng: random.Random) -> None:
    size = 2 * MIB
    (tmp_path / "0").write_bytes(data := rng.randbytes(size // 2))
    data = data.ljust(size, b"\0")
    for level in range(1, 5):
        path = tmp_path / str(level)
        form = "raw" if level == 1 else "qcow2"
        cluster = rng.choice([4096, 65536])
        qemu_img(
            "create",
            "-f",
            "qcow2",
            "-o",
            f"cluster_size={cluster}",
            "-b",
            str(level - 1),
            "-F",
            form,
            path,
            size,
        )
        data = work(path, data, rng, 30)
        check(path)
        holds(path, data)


def test_dirty_bitmaps_are_given_up_when_the_image_is_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, MIB)
    qemu_img("bitmap", "--add", path, "b0")
    with open_image(path) as image:
        ImageDriver(image).write(0, b"x" * 512)
    # qemu-img counts the bitmap's own clusters as lost now, and drops them on repair.
    check(path, leaks=True)
    assert "b0" not in qemu_img("info", path).stdout or "in-use" in qemu_img("info", path).stdout


def test_what_is_not_supported_is_refused_in_words(tmp_path: Path) -> None:
    rows = {
        f"data_file={tmp_path}/ext,data_file_raw=on": "external data file",
        "extended_l2=on": "extended L2",
    }
    for index, (option, words) in enumerate(rows.items()):
        path = tmp_path / str(index)
        qemu_img("create", "-f", "qcow2", "-o", option, path, MIB)
        for readonly in (True, False):
            with pytest.raises(HostError, match=words):
                open_image(path, readonly=readonly)

"""QCOW2 after a crash: whatever of the writes since the last barrier was lost, the image is sound.

What a child writes is logged under it (testing/_log_writes.pyx). A crash is a moment in that log: all before
the last barrier is in the file, and of the rest any part, in pieces as small as a sector.
"""

import importlib.util
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.testing._image import ImageDriver
from tests.peer.qemu_img import check, memory_folder, needs_qemu_img, qemu_img
from tests.unit.block.model import SECTOR, Model
from tests.unit.block.opening import open_image

pytestmark = needs_qemu_img

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
RECORD = struct.Struct("=QQQ")
STEPS = 90
CRASHES = 60
# The child's own records: what it is about to change, and that a flush ended.
CHANGE, FLUSHED = ord("C"), ord("F")

CHILD = """
import sys
from tests.peer.test_qcow2_crash import drive
drive(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""


class Logged(Model):
    """Notes in ``log`` what it does, before and after."""

    weights = (50, 5, 10, 15, 20)

    def __init__(self, data: bytes, rng: random.Random, log: int) -> None:
        super().__init__(data, rng)
        self.log = log

    def note(self, kind: int, offset: int = 0, length: int = 0) -> None:
        os.write(self.log, RECORD.pack(kind, offset, length))

    def write(self, driver: ImageDriver, offset: int, length: int) -> None:
        self.note(CHANGE, offset, length)
        super().write(driver, offset, length)

    def write_zeroes(self, driver: ImageDriver, offset: int, length: int) -> None:
        self.note(CHANGE, offset, length)
        super().write_zeroes(driver, offset, length)

    def discard(self, driver: ImageDriver, offset: int, length: int) -> None:
        self.note(CHANGE, offset, length)
        super().discard(driver, offset, length)

    def flush(self, driver: ImageDriver, offset: int, length: int) -> None:
        super().flush(driver, offset, length)
        self.note(FLUSHED)


def drive(path: str, log: str, seed: int) -> None:
    """The child: never closes the image. What the disk held at each flush goes into files beside the log."""
    rng = random.Random(seed)
    with open(path + ".start", "rb") as file:
        model = Logged(file.read(), rng, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    image = open_image(path)
    driver = ImageDriver(image)
    count = 0
    for _ in range(STEPS):
        if model.step(driver).startswith("flush"):
            with open(f"{log}.{count}", "wb") as file:
                file.write(model.data)
            count += 1
    os._exit(0)


def records(log: bytes) -> Iterator[tuple[str, int, int, bytes]]:
    at = 0
    while at < len(log):
        kind, offset, length = RECORD.unpack_from(log, at)
        at += RECORD.size
        data = log[at : at + length] if kind == ord("W") else b""
        at += len(data)
        yield chr(kind), offset, length, data


def apply(file: bytearray, kind: str, offset: int, length: int, data: bytes) -> None:
    if kind == "T":
        file[length:] = b""
        file.extend(bytes(length - len(file)))
    elif kind == "P":
        end = min(offset + length, len(file))
        file[offset:end] = bytes(max(end - offset, 0))
    elif kind == "W":
        file.extend(bytes(max(offset + length - len(file), 0)))
        file[offset : offset + length] = data


def pieces(kind: str, offset: int, length: int, data: bytes) -> Iterator[tuple[str, int, int, bytes]]:
    """What of a record may be lost alone."""
    if kind != "W":
        yield kind, offset, length, data
        return
    for at in range(0, length, SECTOR):
        yield kind, offset + at, min(SECTOR, length - at), data[at : at + SECTOR]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    yield from memory_folder(tmp_path)


@pytest.fixture(scope="module")
def shim() -> Path:
    """The compiled module, which is for the loader and never imported."""
    spec = importlib.util.find_spec("pileus.testing._log_writes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.mark.parametrize(
    ("option", "start", "snapshot"),
    [
        ("cluster_size=4096", "empty", False),
        ("cluster_size=512,refcount_bits=64", "backed", False),
        ("cluster_size=65536", "backed", True),
        ("cluster_size=4096,compat=0.10", "empty", True),
        ("cluster_size=16384", "compressed", False),
    ],
)
def test_a_crash_leaves_at_most_lost_clusters(
    tmp_path: Path, shim: Path, option: str, start: str, snapshot: bool
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    path, log, size = tmp_path / "image", tmp_path / "log", MIB
    data = bytes(size)
    words: list[object]
    if start != "empty":
        data = rng.randbytes(size // 2) + b"pileus! " * (size // 16)
        (tmp_path / "base").write_bytes(data)
    if start == "compressed":
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", option, tmp_path / "base", path)
    else:
        words = ["-b", tmp_path / "base", "-F", "raw"] if start == "backed" else []
        qemu_img("create", "-f", "qcow2", "-o", option, *words, path, size)
    if snapshot:
        model = Model(data, rng)
        with open_image(path) as image:
            for _ in range(20):
                model.step(ImageDriver(image))
        data = bytes(model.data)
        qemu_img("snapshot", "-c", "kept", path)
    Path(f"{path}.start").write_bytes(data)
    before = path.read_bytes()
    subprocess.run(
        [sys.executable, "-c", CHILD, path, log, str(seed)],
        env=os.environ
        | {"LD_PRELOAD": str(shim), "PILEUS_LOG": str(log), "PILEUS_LOG_TARGET": str(path)}
        | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        check=True,
        timeout=60,
    )
    history = list(records(log.read_bytes()))
    replayed = bytearray(before)
    for each in history:
        apply(replayed, *each)
    assert replayed == path.read_bytes(), "something was written that the log does not have"
    assert any(kind == "S" for kind, *_ in history)
    assert any(kind == "F" for kind, *_ in history)
    # Right before a barrier most is at stake: half of the crashes come there.
    barriers = [index for index, (kind, *_) in enumerate(history) if kind == "S"]
    moments = rng.choices(barriers, k=CRASHES // 2) + rng.choices(range(len(history) + 1), k=CRASHES // 2)
    for moment in sorted(moments):
        _crash(history, moment, before, data, path, log, rng)


def _crash(
    history: list[tuple[str, int, int, bytes]],
    moment: int,
    before: bytes,
    start: bytes,
    path: Path,
    log: Path,
    rng: random.Random,
) -> None:
    past = history[:moment]
    barrier = max((index for index, (kind, *_) in enumerate(past) if kind == "S"), default=0)
    file = bytearray(before)
    for each in past[:barrier]:
        apply(file, *each)
    chance = rng.choice([0.1, 0.5, 0.9, 1.0])
    for each in past[barrier:]:
        whole = rng.random() < 0.5  # mostly a write arrives or does not
        arrives = rng.random() < chance
        for piece in pieces(*each):
            if arrives if whole else rng.random() < chance:
                apply(file, *piece)
    path.write_bytes(file)
    check(path, leaks=True)
    flushes = sum(kind == "F" for kind, *_ in past)
    flushed = Path(f"{log}.{flushes - 1}").read_bytes() if flushes else start
    since = max((index for index, (kind, *_) in enumerate(past) if kind == "F"), default=0)
    changed = bytearray(len(flushed))
    for kind, offset, length, _ in past[since:]:
        if kind == "C":
            changed[offset : offset + length] = b"\1" * length
    with open_image(path, readonly=True) as image:
        now = ImageDriver(image).read(0, len(flushed))
    for at in range(0, len(flushed), SECTOR):
        if not changed[at]:
            assert now[at : at + SECTOR] == flushed[at : at + SECTOR], f"sector at {at:#x}, record {moment}"

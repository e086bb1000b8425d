"""QCOW2 images written by the compiled code, read by its slow twin."""

import errno
import os
import random
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pileus.block.qcow2 import backing_path
from pileus.errors import HostError
from pileus.testing._image import ImageDriver
from tests.unit.block.model import Model
from tests.unit.block.opening import open_image
from tests.unit.block.twin import COMPRESSED, COPIED, OFFSET, ZERO, Twin, create

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    cluster_bits=st.integers(9, 17),
    version=st.sampled_from([2, 3]),
    refcount_order=st.integers(0, 6),
    sectors=st.integers(1, 4096),
    backing_sectors=st.one_of(st.just(0), st.integers(1, 4500)),
    by_image=st.booleans(),
)
def test_the_disk_holds_what_was_written(
    tmp_path: Path,
    seed: int,
    cluster_bits: int,
    version: int,
    refcount_order: int,
    sectors: int,
    backing_sectors: int,
    by_image: bool,
) -> None:
    rng = random.Random(seed)
    base = rng.randbytes(512 * backing_sectors)
    (tmp_path / "base").write_bytes(base)
    size = 512 * sectors
    path = create(
        tmp_path / "image",
        size,
        cluster_bits=cluster_bits,
        version=version,
        refcount_order=refcount_order if version == 3 else 4,
        backing="base" if base else "",
        backing_format="raw" if base else "",
    )
    model = Model(base[:size].ljust(size, b"\0"), rng)
    for _ in range(2):
        with open_image(path) as image:
            driver = ImageDriver(image, by_image)
            for _ in range(40):
                model.step(driver)
            assert driver.read(0, size) == model.data
        twin = Twin(path, base)
        twin.check()
        assert twin.disk() == model.data
        with open_image(path, readonly=True) as image:
            assert ImageDriver(image).read(0, size) == model.data


def test_what_is_allocated_is_used_in_place(tmp_path: Path) -> None:
    with open_image(create(tmp_path / "image", MIB)) as image:
        driver = ImageDriver(image)
        assert driver.extents(0, MIB) == [("zero", MIB, 0)]
        driver.write(0, b"x" * 128 * KIB)
        ((kind, length, offset), rest) = driver.extents(4096, MIB - 4096, write=True)
        assert (kind, length, offset % 65536) == ("data", 128 * KIB - 4096, 4096)
        assert rest[0] == "other"
        assert driver.extents(0, 256 * KIB) == [
            ("data", 128 * KIB, offset - 4096),
            ("zero", 128 * KIB, 128 * KIB),
        ]


def test_a_backing_file_is_read_in_place_too(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * 64 * KIB)
    with open_image(create(tmp_path / "image", MIB, backing="base", backing_format="raw")) as image:
        driver = ImageDriver(image)
        assert driver.extents(0, MIB) == [("data", 64 * KIB, 0), ("zero", MIB - 64 * KIB, 64 * KIB)]
        driver.write(4096, b"x" * 512)
        assert driver.read(0, 8192) == b"b" * 4096 + b"x" * 512 + b"b" * 3584
        driver.write_zeroes(0, 64 * KIB)
        assert driver.read(0, MIB) == bytes(MIB)
    assert (tmp_path / "base").read_bytes() == b"b" * 64 * KIB


def test_a_cluster_in_use_is_not_given_to_anyone_else(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with open_image(path) as image:
        driver = ImageDriver(image)
        driver.write(0, b"a" * 64 * KIB)
        _, _, held = driver.hold(0, 64 * KIB)
        driver.discard(0, 64 * KIB)
        driver.flush()
        driver.write(128 * KIB, b"b" * 64 * KIB)
        assert os.pread(image.fd, 64 * KIB, held) == b"a" * 64 * KIB
        assert driver.extents(128 * KIB, 64 * KIB)[0][2] != held
        driver.let_go()
        driver.flush()
        driver.write(256 * KIB, b"c" * 64 * KIB)
        assert driver.extents(256 * KIB, 64 * KIB)[0][2] == held
    Twin(path).check()


def test_space_goes_back_to_the_host(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 16 * MIB)
    with open_image(path) as image:
        driver = ImageDriver(image)
        driver.write(0, b"a" * 8 * MIB)
        driver.flush()
        full = path.stat().st_blocks
        driver.discard(0, 8 * MIB)
        driver.flush()
        assert path.stat().st_blocks < full - 8 * MIB // 512 + 64
        assert driver.read(0, 8 * MIB) == bytes(8 * MIB)
    Twin(path).check()


def test_zeroes_may_keep_their_space(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    with open_image(path) as image:
        driver = ImageDriver(image)
        driver.write(0, b"a" * 64 * KIB)
        ((_, _, place),) = driver.extents(0, 64 * KIB)
        driver.write_zeroes(0, 64 * KIB, unmap=False)
        assert driver.extents(0, 64 * KIB) == [("zero", 64 * KIB, 0)]
        driver.write(512, b"b" * 512)
        assert driver.extents(0, 64 * KIB) == [("data", 64 * KIB, place)]
        assert driver.read(0, 2048) == bytes(512) + b"b" * 512 + bytes(1024)
    Twin(path).check()


@pytest.mark.parametrize("cluster_bits", [12, 16, 21])
@pytest.mark.parametrize("align", [0, 4096])
def test_direct_io_gives_the_same_bytes(
    tmp_path: Path, cluster_bits: int, align: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    if align:  # more than this host asks for
        monkeypatch.setattr("pileus.block.qcow2.direct_alignment", lambda fd: align)
    rng = random.Random(seed)
    path = create(tmp_path / "image", 4 * MIB, cluster_bits=cluster_bits)
    model = Model(bytes(4 * MIB), rng)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the tests has no O_DIRECT")
    with open_image(path, direct=True) as image:
        driver = ImageDriver(image, by_image=True)  # whose pieces are not aligned
        for _ in range(40):
            model.step(driver)
    Twin(path).check()
    assert Twin(path).disk() == model.data
    with open_image(path, direct=True, readonly=True) as image:
        assert image.logical_block >= (align or 512)
        assert ImageDriver(image).read(0, 4 * MIB) == model.data


def test_a_full_host_fails_what_needs_space_and_nothing_else(tmp_path: Path) -> None:
    """A limit of file sizes stands for a full disk."""
    path = create(tmp_path / "image", 4 * MIB, cluster_bits=12)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_image(path) as image:
        driver = ImageDriver(image)
        driver.write(0, b"a" * 64 * KIB)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 16 * KIB, limit[1]))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                driver.write(MIB, b"b" * MIB)
            driver.write(0, b"c" * 64 * KIB)
            driver.flush()
            assert driver.read(0, 64 * KIB) == b"c" * 64 * KIB
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        driver.write(MIB, b"d" * MIB)
        assert driver.read(MIB, MIB) == b"d" * MIB
    Twin(path).check()


def test_direct_io_needs_clusters_as_large_as_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "image", MIB, cluster_bits=9)
    monkeypatch.setattr("pileus.block.qcow2.direct_alignment", lambda fd: 4096)
    with pytest.raises(HostError, match="too small for direct I/O"):
        open_image(path, direct=True)


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    """Each has its own stripes of every cluster, and reads back what it wrote; one gives clusters back."""
    path = create(tmp_path / "image", 4 * MIB, cluster_bits=12)
    stripe, count = 512, 4
    failures: list[BaseException] = []

    def work(number: int, driver: ImageDriver) -> None:
        rng = random.Random(number)
        data = bytes([number + 1]) * stripe
        try:
            for turn in range(300):
                at = (rng.randrange(3 * MIB // (count * stripe)) * count + number) * stripe
                driver.write(at, data)
                assert driver.read(at, stripe) == data
                if turn % 50 == number:
                    driver.flush()
                if number == 0:
                    at = 3 * MIB + rng.randrange(MIB // 4096) * 4096
                    driver.write(at, b"z" * 4096)
                    driver.discard(at, 4096)
        except BaseException as error:
            failures.append(error)

    with open_image(path) as image:
        driver = ImageDriver(image)
        threads = [threading.Thread(target=work, args=(number, driver)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    Twin(path).check()


def test_nobody_writes_to_an_image_open_for_reading(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB)
    before = path.read_bytes()
    with open_image(path, readonly=True) as image:
        driver = ImageDriver(image)
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            driver.write(0, b"x" * 512)
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            driver.write_zeroes(0, 512)
        driver.discard(0, MIB)
        driver.flush()
        assert not image.can_discard
    assert path.read_bytes() == before


def test_version_2_never_shows_its_backing_file_again(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    path = create(tmp_path / "image", MIB, version=2, backing="base", backing_format="raw")
    with open_image(path) as image:
        driver = ImageDriver(image)
        assert not image.can_discard
        driver.write(0, b"x" * 64 * KIB)
        driver.discard(0, 64 * KIB)
        assert driver.read(0, 512) == b"x" * 512
        driver.write_zeroes(0, 128 * KIB)
        assert driver.read(0, 128 * KIB) == bytes(128 * KIB)
    Twin(path, b"b" * MIB).check()


@pytest.mark.parametrize(("feature", "words"), [(1, "dirty"), (2, "corrupt")])
def test_an_image_that_may_be_wrong_is_only_read(tmp_path: Path, feature: int, words: str) -> None:
    path = create(tmp_path / "image", MIB, features=(feature, 0, 0))
    with pytest.raises(HostError, match=f"cannot open .*image: .*{words}"):
        open_image(path)
    open_image(path, readonly=True).close()


def test_what_goes_stale_is_cleared_when_an_image_is_opened_for_writing(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, features=(0, 1, (1 << 63) | 1))
    open_image(path, readonly=True).close()
    assert struct.unpack_from(">QQ", path.read_bytes(), 80) == (1, (1 << 63) | 1)
    open_image(path).close()
    assert struct.unpack_from(">QQ", path.read_bytes(), 80) == (1, 0)


def test_a_chain_that_bites_its_tail_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "a", MIB, backing="b", backing_format="qcow2")
    create(tmp_path / "b", MIB, backing="a", backing_format="qcow2")
    with pytest.raises(HostError, match="its own backing file"):
        open_image(tmp_path / "a")


def test_a_chain_has_an_end(tmp_path: Path) -> None:
    for index in range(70):
        create(tmp_path / str(index), MIB, backing=str(index + 1), backing_format="qcow2")
    with pytest.raises(HostError, match="more than 64 backing files"):
        open_image(tmp_path / "0")
    create(tmp_path / "64", MIB)
    with open_image(tmp_path / "0") as image:
        assert ImageDriver(image).read(0, 4096) == bytes(4096)


BACKING_PATHS = {
    ("/images/a.qcow2", "base"): "/images/base",
    ("/images/a.qcow2", "../base"): "/images/../base",
    ("/images/a.qcow2", "/other/base"): "/other/base",
    ("a.qcow2", "base"): "base",
    ("sub/a.qcow2", "file:base"): "sub/base",
    ("sub/a.qcow2", "./a:b"): "sub/./a:b",
}


@pytest.mark.parametrize("row", BACKING_PATHS)
def test_a_relative_path_starts_at_the_image(row: tuple[str, str]) -> None:
    assert backing_path(*row) == BACKING_PATHS[row]


@pytest.mark.parametrize("name", ["nbd://host/x", 'json:{"driver":"file"}', "ssh:x/y"])
def test_a_backing_file_is_a_file(name: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        backing_path("image", name)


# Hostile tables. In the images below cluster 4 is the first L2 table, cluster 5 the data of disk cluster 0.
L1, L2, DATA = 3 << 16, 4 << 16, 5 << 16
BAD_ENTRIES = {
    "L2 entry inside a cluster": (L2, DATA + 512 | COPIED),
    "L2 entry with reserved bits": (L2, DATA | 2 | COPIED),
    "L2 entry with high reserved bits": (L2, DATA | 1 << 57 | COPIED),
    "L2 entry without a place": (L2, COPIED),
    "compressed cluster far away": (L2, COMPRESSED | (1 << 53)),
    "compressed cluster that is none": (L2, COMPRESSED | DATA | 0x3F << 54),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = create(tmp_path / "image", MIB)
    with open_image(path) as image:
        ImageDriver(image).write(0, b"\xa5" * 64 * KIB)
    assert Twin(path).l1()[0] == L2 | COPIED
    assert Twin(path).entries()[0] == DATA | COPIED
    return path


def patch(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(8, "big"))


@pytest.mark.parametrize("row", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_fails_what_needs_it_and_nothing_else(written: Path, row: tuple[int, int]) -> None:
    patch(written, *row)
    with open_image(written) as image:
        driver = ImageDriver(image)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            driver.read(0, 512)
        driver.write(128 * KIB, b"x" * 512)
        assert driver.read(128 * KIB, 1024) == b"x" * 512 + bytes(512)


METADATA = {"header": 0, "refcount table": 1 << 16, "refcount block": 2 << 16, "L1 table": L1, "L2 table": L2}


@pytest.mark.parametrize("place", METADATA.values(), ids=METADATA)
def test_a_guest_never_writes_to_a_table(written: Path, place: int) -> None:
    patch(written, L2, place | COPIED)
    before = written.read_bytes()
    with open_image(written) as image:
        driver = ImageDriver(image)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            driver.write(0, b"x" * 512)
    assert written.read_bytes() == before


@pytest.mark.parametrize("place", [0, 1 << 16, 2 << 16, L1, L2])
def test_tables_that_overlap_are_refused_for_writing(tmp_path: Path, place: int) -> None:
    path = create(tmp_path / "image", MIB << 10)
    with open_image(path) as image:
        ImageDriver(image).write(0, b"x" * 512)
    patch(path, L1 + 8, place | COPIED)
    with pytest.raises(HostError, match=r"L1 table, .*(lies on another of its tables|no place)"):
        open_image(path)


def test_a_table_counted_as_free_is_not_given_away(written: Path) -> None:
    """Its refcount block says that all is free: what was trusted so far is spoilt, and marked so."""
    with written.open("r+b") as file:
        file.seek(2 << 16)
        file.write(bytes(64 * KIB))
    with open_image(written) as image:
        driver = ImageDriver(image)
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                driver.write(256 * KIB, b"x" * 512)
        assert driver.read(0, 512) == b"\xa5" * 512
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            driver.flush()
        with pytest.raises(HostError, match="cannot write"):
            image.close()
    with pytest.raises(HostError, match="marked corrupt"):
        open_image(written)


def test_entries_that_share_a_cluster_are_copied_when_written(written: Path) -> None:
    patch(written, L2, DATA)
    patch(written, L2 + 8, DATA)
    with written.open("r+b") as file:
        file.seek((2 << 16) + 2 * 5)
        file.write(b"\0\2")
    with open_image(written) as image:
        driver = ImageDriver(image)
        driver.write(0, b"x" * 512)
        assert driver.read(64 * KIB, 512) == b"\xa5" * 512
        assert driver.read(512, 512) == b"\xa5" * 512
    assert Twin(written).refcounts() == Twin(written).references()


def test_a_plain_zero_cluster_hides_the_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    path = create(tmp_path / "image", MIB, backing="base", backing_format="raw")
    with open_image(path) as image:
        driver = ImageDriver(image)
        driver.write(0, b"x" * 64 * KIB)
        driver.discard(0, 64 * KIB)
        assert driver.read(0, 64 * KIB) == bytes(64 * KIB)
    assert Twin(path).entries()[0] == ZERO
    assert not Twin(path).entries()[0] & OFFSET

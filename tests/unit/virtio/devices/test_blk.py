"""virtio-blk, through a driver in memory: on io_uring and on threads."""

import errno
import os
import random
import resource
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.block._image import Image
from pileus.block.open import open_image
from pileus.config.model import DiskConfig
from pileus.errors import HostError
from pileus.testing import F_NEXT, F_WRITE, FakeDriver
from pileus.testing._fake_image import FakeImage
from pileus.virtio import status
from pileus.virtio.devices import blk
from pileus.virtio.devices.blk import Blk, open_disk

from .disks import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    Disk,
    header,
    segment,
)

SIZE = 1 << 20
MODES = {"io_uring": False, "threads": True}
Open = Callable[..., tuple[FakeDriver, Disk]]


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    return path


@pytest.fixture(params=MODES.values(), ids=list(MODES))
def threads(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def start(threads: bool) -> Iterator[Open]:
    """A device on an image and its driver, which ``about`` is for where it is not the device's."""
    drivers = []

    def start(
        image: Image, about: dict[str, object] | None = None, **device: object
    ) -> tuple[FakeDriver, Disk]:
        driver = FakeDriver(Blk("disk", image, threads=threads, **device), **(about or {}))  # type: ignore[arg-type]
        drivers.append(driver)
        return driver, Disk(driver)

    yield start
    for driver in drivers:
        driver.close()


@pytest.fixture
def disk(start: Open, path: Path) -> Disk:
    return start(open_image(str(path), format="raw"))[1]


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def any_disk(request: pytest.FixtureRequest, start: Open, path: Path) -> Disk:
    return start(open_image(str(path), format="raw", direct=request.param))[1]


def engine_of(disk: Disk) -> object:
    device = disk.driver.device
    assert isinstance(device, Blk)
    return device.engines[0]


# -- requests -------------------------------------------------------------------------------------

CUTS: dict[str, list[int]] = {
    "whole": [],
    "header apart": [16],
    "header in two": [3, 13],
    "bytes": [1] * 20,
    "odd pieces": [17, 511, 1025, 3],
    "sectors": [16, *[512] * 8],
}


def test_it_runs_as_asked(disk: Disk, threads: bool) -> None:
    disk.read(0, 512)
    assert getattr(engine_of(disk), "io") == ("threads" if threads else "io_uring")  # noqa: B009


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
def test_buffers_may_be_cut_in_any_way(
    any_disk: Disk, content: bytes, cuts: list[int], indirect: bool
) -> None:
    assert any_disk.read(7, 4096, cuts=cuts, indirect=indirect) == content[7 * 512 :][:4096]
    assert any_disk.write(16, b"new!" * 1024, cuts=cuts, indirect=indirect) == OK
    assert (
        any_disk.read(15, 5120)
        == content[15 * 512 : 16 * 512] + b"new!" * 1024 + content[24 * 512 : 25 * 512]
    )


def test_the_whole_disk_in_one_request(start: Open, path: Path, content: bytes) -> None:
    _, disk = start(open_image(str(path), format="raw"))
    assert disk.read(0, SIZE) == content


def test_nothing_can_be_read_and_written(disk: Disk) -> None:
    assert disk.read(5, 0) == b""
    assert disk.write(5, b"") == OK


def test_the_serial_number_is_padded_and_cut(start: Open, path: Path) -> None:
    _, disk = start(open_image(str(path), format="raw"), serial="a serial number")
    assert disk.request(header(GET_ID), 20) == (OK, b"a serial number\0\0\0\0\0")
    assert disk.request(header(GET_ID), 4, cuts=[1, 1]) == (OK, b"a se")
    assert disk.request(header(GET_ID), 30) == (OK, b"a serial number".ljust(30, b"\0"))


def test_unknown_requests_are_told_so(disk: Disk) -> None:
    for kind in (2, 3, 5, 14, 0xFFFFFFFF):
        assert disk.request(header(kind), 512)[0] == UNSUPP


def test_segments_are_punched_out_of_the_file(disk: Disk, path: Path, content: bytes) -> None:
    before = path.stat().st_blocks
    assert disk.request(header(DISCARD) + segment(0, 64) + segment(128, 64))[0] == OK
    assert path.stat().st_blocks == before - 128
    assert disk.request(header(WRITE_ZEROES) + segment(512, 128, UNMAP))[0] == OK
    assert path.stat().st_blocks == before - 256
    assert disk.request(header(WRITE_ZEROES) + segment(640, 128))[0] == OK
    assert path.stat().st_blocks == before - 256, "what must not be unmapped stays allocated"
    assert disk.read(512, 256 * 512) == bytes(256 * 512)
    assert disk.read(64, 64 * 512) == content[64 * 512 : 128 * 512]
    assert path.stat().st_size == SIZE


BAD_SEGMENTS = {
    "none": (b"", IOERR),
    "half a one": (segment(0, 1)[:8], IOERR),
    "too many": (segment(0, 1) * 17, IOERR),
    "behind the end": (segment(SIZE // 512 - 1, 2), IOERR),
    "far behind": (segment((1 << 64) - 1, 2), IOERR),
    "a reserved flag": (segment(0, 1, 2), UNSUPP),
}


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("bad", BAD_SEGMENTS.values(), ids=list(BAD_SEGMENTS))
def test_bad_segments_change_nothing(
    disk: Disk, path: Path, content: bytes, bad: tuple[bytes, int], kind: int
) -> None:
    assert disk.request(header(kind) + bad[0])[0] == bad[1]
    assert path.read_bytes() == content
    assert disk.request(header(DISCARD) + segment(0, 1, UNMAP))[0] == UNSUPP  # 5.2.6.2


BAD_RANGES = {
    "behind the end": (SIZE // 512, 512),
    "across the end": (SIZE // 512 - 1, 1024),
    "where offsets wrap": ((1 << 55), 512),
    "the last sector there could be": ((1 << 64) - 1, 512),
    "half a sector": (0, 256),
    "a sector and a byte": (0, 513),
}


@pytest.mark.parametrize("bad", BAD_RANGES.values(), ids=list(BAD_RANGES))
def test_what_is_not_on_the_disk_is_an_error(
    disk: Disk, path: Path, content: bytes, bad: tuple[int, int]
) -> None:
    sector, length = bad
    assert disk.request(header(IN, sector), length)[0] == IOERR
    assert disk.write(sector, b"x" * length) == IOERR
    assert path.read_bytes() == content
    assert disk.read(0, 512) == content[:512]


def test_a_read_only_disk_stays_as_it_is(start: Open, path: Path, content: bytes) -> None:
    driver, disk = start(open_image(str(path), format="raw", readonly=True))
    assert driver.offered & blk.RO
    assert not driver.offered & (blk.DISCARD | blk.WRITE_ZEROES)
    assert disk.write(0, b"x" * 512) == IOERR
    assert disk.request(header(WRITE_ZEROES) + segment(0, 8))[0] == IOERR
    assert disk.request(header(DISCARD) + segment(0, 8))[0] == IOERR
    assert disk.flush() == OK
    assert disk.read(0, 512) == content[:512]
    assert path.read_bytes() == content


def test_the_first_bytes_of_another_format_cannot_be_written(start: Open, path: Path) -> None:
    _, disk = start(open_image(str(path)))
    magic = b"QFI\xfb".ljust(1024, b"\0")
    assert disk.write(0, magic, cuts=[16, 2, 1]) == IOERR
    assert disk.write(0, b"qfi" + magic) != OK
    assert disk.write(0, b"\0" + magic[1:]) == OK
    assert disk.write(1, magic) == OK
    assert path.read_bytes()[:516] == b"\0FI\xfb".ljust(512, b"\0") + b"QFI\xfb"


def test_a_format_that_was_named_is_not_guarded(disk: Disk, path: Path) -> None:
    assert disk.write(0, b"QFI\xfb".ljust(512, b"\0")) == OK


# -- what the driver sees -------------------------------------------------------------------------


def test_the_configuration(start: Open, path: Path) -> None:
    driver, _ = start(open_image(str(path), format="raw"), num_queues=3, queue_size=64)
    fields = blk.CONFIG.unpack(driver.read_config())
    assert blk.CONFIG.size == 72
    assert fields[0] == SIZE // 512
    assert fields[2] == 62, "with header and status it fills the queue"
    assert fields[6:10] == (512, 3, 0, 8)
    assert struct.unpack_from("<BxH", driver.read_config(), 32) == (1, 3)
    assert struct.unpack_from("<III", driver.read_config(), 36) == (blk.MAX_SECTORS, 16, 8)
    assert driver.read_config(72, 4) == bytes(4)


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_that_kicks_only_when_asked_is_served(start: Open, path: Path, event_idx: bool) -> None:
    driver, _ = start(open_image(str(path), format="raw"), {"event_idx": event_idx})
    for turn in range(300):
        for sector in range(turn % 5 + 1):
            driver.add([header(IN, sector)], [513])
            driver.kick_if_wanted()
        driver.wait(count=turn % 5 + 1)


def test_many_at_once_come_back_once_each(start: Open, path: Path, content: bytes) -> None:
    driver, _ = start(open_image(str(path), format="raw"))
    for turn in range(20):
        sectors = {driver.add([header(IN, n * turn)], [513], indirect=True): n * turn for n in range(100)}
        driver.kick()
        found = driver.wait(count=100)
        assert {used.head for used in found} == sectors.keys()
        for head, sector in sectors.items():
            assert driver.read(head) == content[sector * 512 :][:512] + b"\0"


def test_every_queue_is_served_at_the_same_time(start: Open, path: Path, content: bytes) -> None:
    driver, _ = start(open_image(str(path), format="raw"), num_queues=4)
    for turn in range(20):
        heads = [driver.add([header(IN, turn + queue)], [513], queue) for queue in range(4)]
        for queue in range(4):
            driver.kick(queue)
        for queue, head in enumerate(heads):
            driver.wait(queue)
            assert driver.read(head, queue)[:512] == content[(turn + queue) * 512 :][:512]


def test_what_is_written_to_memory_is_tracked(start: Open, path: Path) -> None:
    driver, _ = start(open_image(str(path), format="raw"))
    driver.memory.start_tracking()
    driver.memory.take_dirty(0)
    head = driver.add([header(IN)], [8192, 1])
    driver.kick()
    driver.wait()
    bits = int.from_bytes(driver.memory.take_dirty(0), "little")
    for block in driver.rings[0].blocks(head):
        if block.writable:
            for page in range(block.gpa >> 12, (block.gpa + block.size - 1 >> 12) + 1):
                assert bits >> page & 1
    assert bits >> (driver.rings[0].used_ring >> 12) & 1
    driver.memory.stop_tracking()


# -- durability -----------------------------------------------------------------------------------


def words(image: FakeImage) -> list[str]:
    return [word for word, _, _ in image.events]


def test_a_flush_reaches_the_image(start: Open) -> None:
    image = FakeImage(SIZE, "o")
    _, disk = start(image)
    assert disk.write(0, b"x" * 512) == OK
    assert disk.flush() == OK
    assert words(image) == ["write", "flush"]
    image.errors["flush"] = errno.EIO
    assert disk.flush() == IOERR


@pytest.mark.parametrize("kinds", ["d", "o", "do"])
def test_without_a_write_cache_each_write_is_flushed_before_it_is_done(start: Open, kinds: str) -> None:
    image = FakeImage(SIZE, kinds)
    driver, disk = start(image)
    driver.write_config(blk.WRITEBACK, b"\0")
    assert driver.read_config(blk.WRITEBACK, 1) == b"\0"
    assert words(image) == ["flush"], "what came before"
    assert disk.write(0, b"x" * 8192) == OK
    assert words(image)[-1] == "flush"
    assert words(image).count("flush") == 2
    assert disk.request(header(WRITE_ZEROES) + segment(0, 1))[0] == OK
    assert words(image)[-2:] == ["zero", "flush"]
    driver.write_config(blk.WRITEBACK, b"\1")
    assert disk.write(0, b"x" * 512) == OK
    assert words(image).count("flush") == 3


def test_a_failed_flush_fails_the_write_that_needs_it(start: Open) -> None:
    image = FakeImage(SIZE, "d")
    driver, disk = start(image)
    driver.write_config(blk.WRITEBACK, b"\0")
    image.errors["flush"] = errno.EIO
    assert disk.write(0, b"x" * 512) == IOERR


def test_a_driver_that_cannot_flush_has_no_write_cache(start: Open) -> None:
    image = FakeImage(SIZE, "d")
    driver, disk = start(image, {"features": 0})
    assert driver.read_config(blk.WRITEBACK, 1) == b"\0"
    assert disk.write(0, b"x" * 512) == OK
    assert words(image)[-1] == "flush"
    driver.write_config(blk.WRITEBACK, b"\1")
    assert driver.read_config(blk.WRITEBACK, 1) == b"\0", "nobody negotiated that"


def test_a_raw_disk_without_a_write_cache_works(any_disk: Disk) -> None:
    any_disk.driver.write_config(blk.WRITEBACK, b"\0")
    assert any_disk.write(8, b"y" * 4096) == OK
    assert any_disk.read(8, 4096) == b"y" * 4096


# -- images that are no plain bytes ---------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["d", "o", "z", "do", "dzo", "oodzzd"])
@pytest.mark.parametrize("piece", [512, 4096])
def test_a_request_is_cut_where_the_image_says(start: Open, kinds: str, piece: int) -> None:
    image = FakeImage(SIZE, kinds, piece=piece)
    plain = random.Random(2).randbytes(SIZE)
    image.content = plain
    expected = b"".join(
        plain[at : at + piece] if kinds[at // piece % len(kinds)] != "z" else bytes(piece)
        for at in range(0, SIZE, piece)
    )
    _, disk = start(image)
    threaded = getattr(engine_of(disk), "io") == "threads"  # noqa: B009
    assert (
        disk.read(3, 20480, cuts=[1000, 3000, 512, 1]) == (plain if threaded else expected)[3 * 512 :][:20480]
    )
    assert disk.write(3, b"w" * 20480, cuts=[20, 3000, 512, 1]) == OK
    assert image.content == plain[: 3 * 512] + b"w" * 20480 + plain[3 * 512 + 20480 :]
    assert image.held == 0


@pytest.mark.parametrize("what", ["read", "write", "discard", "zero", "unmap", "map"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP])
def test_errors_of_the_image_reach_the_driver(start: Open, threads: bool, what: str, number: int) -> None:
    image = FakeImage(SIZE, "o")
    _, disk = start(image)
    image.errors[what] = number
    results = {
        "read": disk.request(header(IN), 512)[0],
        "write": disk.write(0, b"x" * 512),
        "discard": disk.request(header(DISCARD) + segment(0, 1))[0],
        "zero": disk.request(header(WRITE_ZEROES) + segment(0, 1))[0],
        "unmap": disk.request(header(WRITE_ZEROES) + segment(0, 1, UNMAP))[0],
    }
    failed = {"read", "write"} if what == "map" and not threads else {what}
    expected = UNSUPP if number == errno.EOPNOTSUPP else IOERR
    assert results == {word: expected if word in failed else OK for word in results}
    assert image.held == 0


# -- trouble with the file ------------------------------------------------------------------------


def test_a_file_that_shrinks_fails_only_what_it_lacks(any_disk: Disk, path: Path, content: bytes) -> None:
    os.truncate(path, SIZE // 2)
    assert any_disk.request(header(IN, SIZE // 512 - 8), 4096)[0] == IOERR
    assert any_disk.request(header(IN, SIZE // 1024 - 8), 8192)[0] == IOERR
    assert any_disk.read(0, 4096) == content[:4096]
    assert any_disk.write(SIZE // 512 - 8, b"z" * 4096) == OK
    assert any_disk.read(SIZE // 512 - 8, 4096) == b"z" * 4096


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_fails_the_write(disk: Disk, path: Path) -> None:
    os.truncate(path, SIZE // 2)
    with files_no_longer_than(SIZE * 3 // 4):
        assert disk.write(SIZE * 3 // 4 // 512, b"x" * 4096) == IOERR
        assert disk.write(SIZE * 3 // 4 // 512 - 4, b"x" * 4096) == IOERR, "half of it"
        assert disk.write(0, b"x" * 4096) == OK


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_file_system_fails_the_write(start: Open, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        path = tmp_path / "disk"
        with path.open("wb") as file:
            file.truncate(SIZE)
        driver, disk = start(open_image(str(path), format="raw"))
        assert disk.write(0, b"x" * 32768) == OK
        assert disk.write(512, b"x" * 65536) == IOERR
        assert disk.read(0, 32768) == b"x" * 32768
        driver.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# -- life -----------------------------------------------------------------------------------------


def test_a_reset_waits_for_what_is_under_way(start: Open) -> None:
    image = FakeImage(SIZE, "o", gated=True)
    driver, _ = start(image)
    for sector in range(10):
        driver.add([header(IN, sector)], [513])
    driver.kick()
    deadline = time.monotonic() + 10
    while not image.waited and time.monotonic() < deadline:  # until the engine has some
        time.sleep(0.001)
    resetter = threading.Thread(target=driver.reset)
    resetter.start()
    resetter.join(0.1)
    assert resetter.is_alive()
    image.open_gate()
    resetter.join(10)
    assert not resetter.is_alive()
    assert driver.rings[0].used_index in range(11)
    driver.start()
    assert Disk(driver).read(0, 512) == bytes(512)


def test_a_pause_leaves_what_is_offered_for_later(disk: Disk, content: bytes) -> None:
    driver = disk.driver
    device = driver.device
    assert isinstance(device, Blk)
    for _ in range(10):
        device.pause()
        head = driver.add([header(IN, 4)], [513])
        driver.kick()
        time.sleep(0.005)
        assert driver.used() == []
        device.resume()
        driver.wait()
        assert driver.read(head)[:512] == content[4 * 512 : 5 * 512]


def test_resets_in_the_middle_of_everything(start: Open, path: Path) -> None:
    driver, disk = start(open_image(str(path), format="raw"), num_queues=2)
    for turn in range(20):
        for queue in range(2):
            for sector in range(30):
                driver.add([header(IN, sector)], [4097], queue)
            driver.kick(queue)
        if turn % 2:
            driver.wait(turn % 4 // 2)
        driver.start()
    assert disk.read(0, 512)


def test_the_write_cache_is_saved(start: Open) -> None:
    driver, _ = start(FakeImage(SIZE))
    driver.write_config(blk.WRITEBACK, b"\0")
    saved = driver.device.state()
    other, _ = start(FakeImage(SIZE))
    other.device.restore(saved)
    assert other.read_config(blk.WRITEBACK, 1) == b"\0"
    assert saved == {"writeback": False}


def test_nothing_stays_open(tmp_path: Path, threads: bool, path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with FakeDriver(Blk("disk", open_image(str(path), format="raw"), threads=threads)) as driver:
        Disk(driver).read(0, 512)
    assert sorted(os.listdir("/proc/self/fd")) == before
    open_image(str(path), format="raw").close()  # nor locked


# -- a driver that breaks the rules ---------------------------------------------------------------

BAD_CHAINS: dict[str, tuple[list[bytes], list[int]]] = {
    "no status": ([header(IN)], []),
    "half a header": ([header(IN)[:8]], [513]),
    "nothing to read": ([], [513]),
}


@pytest.mark.parametrize("chain", BAD_CHAINS.values(), ids=list(BAD_CHAINS))
def test_a_chain_that_is_no_request_stops_the_device(
    disk: Disk, chain: tuple[list[bytes], list[int]]
) -> None:
    driver = disk.driver
    good = driver.add([header(IN)], [513])
    driver.add(*chain)
    driver.kick()
    assert [used.head for used in driver.wait()] == [good], "what came before is done"
    deadline = time.monotonic() + 10
    while not driver.status & status.NEEDS_RESET:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    driver.start()
    assert disk.read(0, 512)


def test_a_head_that_is_offered_again_and_again_is_served_each_time(disk: Disk) -> None:
    driver = disk.driver
    ring = driver.rings[0]
    ring.memory.write(0x200000, header(IN))
    for index, (gpa, length, flags) in enumerate(
        [(0x200000, 16, 0), (0x201000, 512, F_WRITE), (0x202000, 1, F_WRITE)]
    ):
        driver.write_descriptor(index, gpa, length, flags | (F_NEXT if index < 2 else 0), index + 1)
    for _ in range(ring.size):
        driver.offer(0)
    driver.kick()
    assert [used.head for used in driver.wait(count=ring.size)] == [0] * ring.size


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_requests_leave_the_disk_as_a_model_says(data: st.DataObject) -> None:
    """The slow twin: a bytearray."""
    threads = data.draw(st.booleans())
    kinds = data.draw(st.sampled_from(["d", "o", "do"]))
    size = 16 * 512
    image = FakeImage(size, kinds, piece=1024)
    model = bytearray(size)
    with FakeDriver(Blk("disk", image, threads=threads)) as driver:
        disk = Disk(driver)
        for _ in range(data.draw(st.integers(1, 8))):
            sector = data.draw(st.integers(0, 17))
            count = data.draw(st.integers(0, 17))
            cuts = data.draw(st.lists(st.integers(1, 3000), max_size=6))
            fits = sector + count <= 16
            at, length = sector * SECTOR, count * SECTOR
            match data.draw(st.sampled_from([IN, OUT, WRITE_ZEROES])):
                case 0:
                    result, got = disk.request(header(IN, sector), length, cuts=cuts)
                    assert result == (OK if fits else IOERR)
                    assert not fits or got == model[at : at + length]
                case 1:
                    new = random.Random(sector).randbytes(length)
                    assert disk.write(sector, new, cuts=cuts) == (OK if fits else IOERR)
                    if fits:
                        model[at : at + length] = new
                case _:
                    result, _ = disk.request(header(WRITE_ZEROES) + segment(sector, count), cuts=cuts)
                    assert result == (OK if fits else IOERR)
                    if fits:
                        model[at : at + length] = bytes(length)
        assert image.content == model
        assert image.held == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chain_is_answered_or_stops_the_device(data: st.DataObject) -> None:
    image = FakeImage(16 * 512, data.draw(st.sampled_from(["d", "o", "dzo"])), piece=512)
    buffers = st.lists(st.integers(1, 2000), max_size=5)
    kinds = st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77])
    with FakeDriver(Blk("disk", image, threads=data.draw(st.booleans()))) as driver:
        for _ in range(5):
            start = header(data.draw(kinds), data.draw(st.integers(0, 20) | st.integers(0, (1 << 64) - 1)))
            readable = [start[: data.draw(st.sampled_from([16, 16, 16, 15, 1]))]]
            readable += [random.Random(size).randbytes(size) for size in data.draw(buffers)]
            writable = data.draw(buffers)
            driver.add(readable, writable)
            driver.kick()
            fits = sum(map(len, readable)) >= 16 and writable
            deadline = time.monotonic() + 10
            while not driver.used() and not driver.status & status.NEEDS_RESET:
                assert time.monotonic() < deadline
            assert bool(driver.status & status.NEEDS_RESET) == (not fits)
            if not fits:
                driver.start()
        driver.reset()
        assert image.held == 0


# -- opening --------------------------------------------------------------------------------------


def test_a_disk_of_a_configuration(path: Path, content: bytes) -> None:
    config = DiskConfig(path=str(path), readonly=True, num_queues=2, queue_size=32, serial="nr", id="root")
    device = open_disk(config, 3)
    assert device.name == "root"
    assert [queue.max_size for queue in device.queues] == [32, 32]
    with FakeDriver(device) as driver:
        assert Disk(driver).read(2, 512, queue=1) == content[1024:1536]
    other = open_disk(DiskConfig(path=str(path)), 3)
    assert other.name == "_disk3"
    other.close()


def test_an_empty_file_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(HostError, match="at least one sector"):
        open_disk(DiskConfig(path=str(tmp_path / "empty")), 0)

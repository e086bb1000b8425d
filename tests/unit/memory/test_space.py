"""Every access to guest memory is checked against its regions."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.errors import HostError
from pileus.memory import GuestMemory, Region

PAGE = 4096
HOLE = 16 * PAGE  # the low region ends here
HIGH = 32 * PAGE
END = HIGH + 8 * PAGE


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(0, Region(-1, HOLE)), (HIGH, Region(-1, END - HIGH))]) as memory:
        yield memory


def inside(gpa: int, length: int) -> bool:
    """The slow twin: is all of it RAM of one region?"""
    return any(low <= gpa and gpa + length <= high for low, high in ((0, HOLE), (HIGH, END)))


EDGES = [0, HOLE, HIGH, END, 1 << 32, 1 << 63, (1 << 64) - 1]
ADDRESSES = st.sampled_from(EDGES).flatmap(
    lambda edge: st.integers(max(0, edge - 9), min(edge + 9, (1 << 64) - 1))
)


@given(gpa=ADDRESSES, length=st.integers(1, 20))
def test_an_access_is_allowed_exactly_within_one_region(gpa: int, length: int) -> None:
    with GuestMemory([(0, Region(-1, HOLE)), (HIGH, Region(-1, END - HIGH))]) as memory:
        data = bytes(range(length))
        if inside(gpa, length):
            memory.write(gpa, data)
            assert memory.read(gpa, length) == data
            assert bytes(memory.view(gpa, length)) == data
            return
        for call in (
            lambda: memory.write(gpa, data),
            lambda: memory.read(gpa, length),
            lambda: memory.view(gpa, length),
            lambda: memory.mark_dirty(gpa, length),
            lambda: memory.load_file(gpa, 0, 0, length),
        ):
            with pytest.raises(ValueError, match="not guest memory"):
                call()


def test_no_bytes_are_no_access(memory: GuestMemory) -> None:
    memory.write(HOLE, b"")
    assert memory.read(HOLE, 0) == b""


def test_marking_no_bytes_at_the_start_of_a_region_marks_nothing(memory: GuestMemory) -> None:
    memory.start_tracking()
    memory.mark_dirty(HIGH, 0)
    assert not any(memory.take_dirty(1))


@given(st.lists(st.tuples(st.integers(0, HOLE - 1), st.integers(1, 3 * PAGE)), max_size=20))
def test_the_pages_we_write_are_dirty_once(writes: list[tuple[int, int]]) -> None:
    with GuestMemory([(0, Region(-1, HOLE))]) as memory:
        memory.write(0, b"before")
        memory.start_tracking()
        expected = 0
        for gpa, length in writes:
            length = min(length, HOLE - gpa)  # noqa: PLW2901
            memory.write(gpa, bytes(length))
            for page in range(gpa // PAGE, (gpa + length - 1) // PAGE + 1):
                expected |= 1 << page
        assert int.from_bytes(memory.take_dirty(0), "little") == expected
        assert not any(memory.take_dirty(0))


def test_dirty_pages_are_told_only_while_tracked(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="not tracked"):
        memory.take_dirty(0)


def test_a_page_that_is_not_all_ram_has_its_bit() -> None:
    size = 64 * PAGE + 1
    with GuestMemory([(0, Region(-1, size))]) as memory:
        memory.start_tracking()
        memory.write(size - 1, b"x")
        assert int.from_bytes(memory.take_dirty(0), "little") == 1 << 64


def test_threads_lose_no_mark() -> None:
    """Each thread marks pages of its own, interleaved with the others' in the same words."""
    with GuestMemory([(0, Region(-1, HOLE * 16))]) as memory:
        memory.start_tracking()

        def write(first: int) -> None:
            for _ in range(50):
                for page in range(first, 256, 4):
                    memory.write(page * PAGE, b"x")

        threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        taken = 0
        while any(thread.is_alive() for thread in threads):
            taken |= int.from_bytes(memory.take_dirty(0), "little")
        for thread in threads:
            thread.join()
        assert taken | int.from_bytes(memory.take_dirty(0), "little") == (1 << 256) - 1


def test_a_file_goes_straight_to_memory(memory: GuestMemory, tmp_path: Path) -> None:
    data = os.urandom(3 * PAGE + 5)
    (tmp_path / "file").write_bytes(b"skipped" + data)
    with (tmp_path / "file").open("rb") as file:
        memory.start_tracking()
        memory.load_file(HIGH + 1, file.fileno(), 7, len(data))
        assert memory.read(HIGH + 1, len(data)) == data
        assert int.from_bytes(memory.take_dirty(1), "little") == 0b1111
        with pytest.raises(EOFError, match="1 bytes early"):
            memory.load_file(0, file.fileno(), 7, len(data) + 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.load_file(0, -1, 0, 1)


def test_a_region_with_views_is_not_unmapped() -> None:
    memory = GuestMemory([(0, Region(-1, HOLE))])
    view = memory.view(0, 8)
    region = memory.regions[0][1]
    with pytest.raises(BufferError, match="1 views"):
        region.close()
    view[:3] = b"abc"
    assert bytes(view[:3]) == b"abc"
    view.release()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        memoryview(region)


def test_what_a_view_kept_open_can_be_closed_later() -> None:
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, HOLE)
    memory = GuestMemory([(0, Region(-1, HOLE)), (HIGH, Region(fd, HOLE))])
    view = memory.view(HIGH, 1)
    with pytest.raises(BufferError, match="1 views"):
        memory.close()
    view.release()
    memory.close()
    assert not open_files(fd)


def test_a_region_that_nobody_closed_closes_itself() -> None:
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, PAGE)
    region = Region(fd, PAGE)
    del region
    assert not open_files(fd)


def test_a_region_that_cannot_be_mapped_leaves_its_file_to_the_caller() -> None:
    fd = os.memfd_create("test-ram")
    with pytest.raises(HostError, match="cannot map 0 MiB of guest memory: Invalid argument"):
        Region(fd, 0)
    assert open_files(fd)
    os.close(fd)


def open_files(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_more_regions_than_there_is_room_for_are_refused() -> None:
    regions = [(index * PAGE, Region(-1, PAGE)) for index in range(65)]
    with pytest.raises(ValueError, match="at most 64 regions"):
        GuestMemory(regions)


@pytest.mark.parametrize("gpa", [-1, 1 << 64])
def test_an_address_beyond_64_bits_is_no_address(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(OverflowError):
        memory.read(gpa, 1)


def test_a_closed_space_answers_nothing(memory: GuestMemory) -> None:
    memory.close()
    with pytest.raises(ValueError, match="not guest memory"):
        memory.read(0, 1)

"""Every access to guest memory is checked against its regions."""

import os
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
    for gpa in EDGES:
        memory.write(gpa, b"")
        assert memory.read(gpa, 0) == b""
        memory.mark_dirty(gpa, 0)
        memory.load_file(gpa, -1, 0, 0)


TRACKED = [(0, 70 * PAGE), (1 << 32, 130 * PAGE)]  # more than a word of bits each, and no whole words
WRITE, MARK, LOAD = "write", "mark_dirty", "load_file"
WRITES = st.tuples(
    st.sampled_from([WRITE, MARK, LOAD]),
    st.integers(0, 1),
    st.integers(0, 130 * PAGE),
    st.integers(0, 3 * PAGE),
)


@given(st.lists(WRITES, max_size=20))
def test_the_pages_we_write_are_dirty_once(writes: list[tuple[str, int, int, int]]) -> None:
    with GuestMemory([(gpa, Region(-1, size)) for gpa, size in TRACKED]) as memory:
        memory.write(0, b"before")
        memory.start_tracking()
        expected = [0, 0]  # the slow twin
        with open("/dev/zero", "rb") as zeros:
            for how, index, start, wanted in writes:
                base, size = TRACKED[index]
                offset = start % size
                length = min(wanted, size - offset)
                if how == WRITE:
                    memory.write(base + offset, bytes(length))
                elif how == MARK:
                    memory.mark_dirty(base + offset, length)
                else:
                    memory.load_file(base + offset, zeros.fileno(), 0, length)
                for page in range(size // PAGE):
                    if offset < (page + 1) * PAGE and page * PAGE < offset + length and length:
                        expected[index] |= 1 << page
        for index in (0, 1):
            assert int.from_bytes(memory.take_dirty(index), "little") == expected[index]
            assert not any(memory.take_dirty(index))


def test_a_page_that_is_not_whole_has_its_bit_too() -> None:
    with GuestMemory([(0, Region(-1, 64 * PAGE + 1))]) as memory:
        memory.start_tracking()
        memory.write(64 * PAGE, b"x")
        assert int.from_bytes(memory.take_dirty(0), "little") == 1 << 64


def test_what_came_before_a_file_ended_is_dirty(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (PAGE + 1))
    memory.start_tracking()
    with (tmp_path / "file").open("rb") as file, pytest.raises(EOFError, match=f"{PAGE - 1} bytes early"):
        memory.load_file(0, file.fileno(), 0, 2 * PAGE)
    assert memory.read(PAGE, 1) == b"x"
    assert int.from_bytes(memory.take_dirty(0), "little") == 0b11


def test_dirty_pages_are_told_only_while_tracked(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="not tracked"):
        memory.take_dirty(0)


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


def shared(size: int) -> Region:
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, size)
    return Region(fd, size)


def test_a_close_that_a_view_forbids_closes_nothing_and_may_be_repeated() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    memory = GuestMemory([(0, shared(PAGE)), (HIGH, shared(PAGE))])
    view = memory.view(HIGH, 8)
    with pytest.raises(BufferError, match="1 views"):
        memory.close()
    memory.write(0, b"as before")
    assert memory.ranges == [(0, PAGE), (HIGH, PAGE)]
    view.release()
    memory.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_space_that_nobody_closed_leaves_no_fd() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    memory = GuestMemory([(0, shared(PAGE))])
    del memory
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_region_that_never_was_closes_no_fd_of_others() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(TypeError):
        Region("no fd", PAGE)  # type: ignore[arg-type]
    fd = os.memfd_create("test-ram")
    with pytest.raises(HostError, match="cannot map 0 MiB of guest memory"):
        Region(fd, 0)
    os.close(fd)  # still the caller's
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_closed_space_answers_nothing(memory: GuestMemory) -> None:
    memory.close()
    with pytest.raises(ValueError, match="not guest memory"):
        memory.read(0, 1)

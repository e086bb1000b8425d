"""Memory that goes back to the host reads as zeroes, and nothing beside it is touched."""

import os
from pathlib import Path

import pytest

from pileus.errors import HostError
from pileus.memory import GuestMemory, Region

PAGE = 4096
SIZE = 16 * PAGE


def anonymous(_: Path) -> Region:
    return Region(-1, SIZE)


def memfd(_: Path) -> Region:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return Region(fd, SIZE)


def second_half_of_a_file(folder: Path) -> Region:
    fd = os.open(folder / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, 2 * SIZE)
    os.pwrite(fd, b"\xff" * SIZE, 0)
    return Region(fd, SIZE, offset=SIZE)


@pytest.mark.parametrize("make", [anonymous, memfd, second_half_of_a_file])
def test_discarded_pages_are_zeroes_and_their_neighbours_are_not(make: object, tmp_path: Path) -> None:
    assert callable(make)
    with GuestMemory([(0, Region(-1, PAGE)), (1 << 32, make(tmp_path))]) as memory:
        base = 1 << 32
        memory.write(base, b"\xff" * SIZE)
        memory.start_tracking()
        assert memory.discard(base + PAGE, 3 * PAGE) == 3 * PAGE
        assert memory.read(base, 5 * PAGE) == b"\xff" * PAGE + bytes(3 * PAGE) + b"\xff" * PAGE
        assert memory.take_dirty(1)[0] == 0b1110
        memory.write(base + PAGE, b"again")
        assert memory.read(base + PAGE, 5) == b"again"
    if (tmp_path / "ram").exists():
        assert (tmp_path / "ram").read_bytes()[:SIZE] == b"\xff" * SIZE


def test_a_memfd_gives_its_pages_back_to_the_host() -> None:
    with GuestMemory([(0, memfd(Path()))]) as memory:
        memory.write(0, b"\xff" * SIZE)
        fd = memory.regions[0][1].fd
        before = os.fstat(fd).st_blocks
        memory.discard(0, SIZE)
        assert os.fstat(fd).st_blocks == before - SIZE // 512
        assert os.fstat(fd).st_size == SIZE


def test_only_whole_pages_go() -> None:
    with GuestMemory([(0, Region(-1, SIZE))]) as memory:
        memory.write(0, b"\xff" * SIZE)
        assert memory.discard(1, PAGE) == 0
        assert memory.discard(PAGE - 1, PAGE + 2) == PAGE
        assert memory.read(0, 3 * PAGE) == b"\xff" * PAGE + bytes(PAGE) + b"\xff" * PAGE
        assert memory.discard(0, 0) == 0


def test_only_whole_huge_pages_go() -> None:
    with GuestMemory([(0, Region(-1, SIZE, page_size=8 * PAGE))]) as memory:
        memory.write(0, b"\xff" * SIZE)
        assert memory.discard(PAGE, 8 * PAGE) == 0
        assert memory.discard(PAGE, SIZE - PAGE) == 8 * PAGE
        assert memory.read(8 * PAGE - 1, 2) == b"\xff\0"


@pytest.mark.parametrize(("gpa", "length"), [(SIZE, PAGE), (0, SIZE + 1), ((1 << 64) - PAGE, 2 * PAGE)])
def test_what_is_not_guest_memory_is_refused(gpa: int, length: int) -> None:
    with GuestMemory([(0, Region(-1, SIZE))]) as memory, pytest.raises(ValueError, match="not guest memory"):
        memory.discard(gpa, length)


def test_a_host_that_refuses_is_named() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    with GuestMemory([(0, Region(fd, SIZE))]) as memory:
        copy = os.dup(fd)
        os.dup2(read_only, fd)
        with pytest.raises(HostError, match="give back 4096 bytes of guest memory"):
            memory.discard(0, PAGE)
        os.dup2(copy, fd)
        os.close(copy)
    os.close(read_only)

"""Mappings of a file that its owner truncates."""

import os
import subprocess
import sys

import pytest

from pileus.errors import HostError
from pileus.memory import GuestMemory, Region, _sigbus

PAGE = 4096


@pytest.fixture
def told() -> int:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    _sigbus.tell(fd)
    return fd


def test_memory_whose_file_was_truncated_reads_as_zeroes_and_is_told(told: int) -> None:
    fd = os.memfd_create("gone")
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"x" * 4 * PAGE, 0)
    with GuestMemory([(0, Region(fd, 4 * PAGE, guarded=True))]) as memory:
        os.ftruncate(fd, PAGE)
        assert memory.read(0, 2) == b"xx"
        assert memory.read(2 * PAGE, 2) == b"\0\0"
        memory.write(3 * PAGE, b"still")
        assert memory.read(3 * PAGE, 5) == b"still"
    assert os.eventfd_read(told) == 2
    _sigbus.tell(-1)
    os.close(told)


def test_the_kernel_refuses_such_memory_by_itself(told: int) -> None:
    fd = os.memfd_create("gone")
    os.ftruncate(fd, PAGE)
    with GuestMemory([(0, Region(fd, PAGE, guarded=True))]) as memory:
        os.ftruncate(fd, 0)
        with open("/dev/zero", "rb") as zero, pytest.raises(OSError, match="Bad address"):
            memory.load_file(0, zero.fileno(), 0, PAGE)
    _sigbus.tell(-1)
    os.close(told)


def test_a_region_may_begin_and_end_anywhere_in_its_file() -> None:
    fd = os.memfd_create("odd")
    os.ftruncate(fd, 15120)
    os.pwrite(fd, b"here", PAGE + 100)
    with GuestMemory([(0x1000, Region(fd, 15020 - PAGE, PAGE + 100))]) as memory:
        assert memory.read(0x1000, 4) == b"here"
        memory.write(0x1000 + 15020 - PAGE - 1, b"e")
        assert os.pread(fd, 9, 15119) == b"e"


@pytest.mark.parametrize(
    "place", [(1 << 63, 4096), (4096, (1 << 64) - 8), ((1 << 64) - 1, 4096), (1, 1 << 63)]
)
def test_a_region_that_wraps_is_refused(place: tuple[int, int]) -> None:
    size, offset = place
    fd = os.memfd_create("small")
    with pytest.raises(HostError, match="cannot map"):
        Region(fd, size, offset)
    os.close(fd)


def test_other_faults_end_the_process_as_ever() -> None:
    text = """
import mmap, os
from pileus.memory import Region
fd = os.memfd_create("other")
os.ftruncate(fd, 4096)
guarded = Region(os.memfd_create("guarded"), 4096, guarded=True)
place = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
place[0]
"""
    result = subprocess.run([sys.executable, "-c", text], check=False, timeout=60)
    assert result.returncode == -7

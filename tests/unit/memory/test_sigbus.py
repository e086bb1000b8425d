"""A file that is cut short under a mapping costs that file, not this process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.memory import GuestMemory, Region
from pileus.memory._sigbus import Guard

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"\xa5" * SIZE)
    region = Region(fd, SIZE)
    yield region
    region.close()


def test_what_is_gone_reads_as_zeroes_and_is_lost(region: Region) -> None:
    guard = Guard(region.hva, SIZE)
    memory = memoryview(region)
    os.ftruncate(region.fd, PAGE)
    assert not guard.lost
    assert memory[PAGE - 1] == 0xA5
    assert memory[5 * PAGE + 7] == 0
    assert guard.lost
    memory[5 * PAGE + 7] = 1
    assert memory[5 * PAGE + 7] == 1
    assert memory[PAGE - 1] == 0xA5
    memory.release()
    guard.close()
    assert not guard.lost
    guard.close()


def test_a_guard_knows_its_own_mapping_only(region: Region, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, SIZE)
    with GuestMemory([(0, Region(fd, SIZE))]) as other:
        guards = [Guard(region.hva, SIZE), Guard(other.regions[0][1].hva, SIZE)]
        os.ftruncate(fd, 0)
        assert other.read(PAGE, 4) == bytes(4)
        assert [guard.lost for guard in guards] == [False, True]
        for guard in guards:
            guard.close()


def test_there_is_room_for_as_many_as_a_guest_has_regions(region: Region) -> None:
    guards = [Guard(region.hva, SIZE) for _ in range(256)]
    with pytest.raises(ValueError, match="at most 256"):
        Guard(region.hva, SIZE)
    guards.pop().close()
    Guard(region.hva, SIZE).close()


BUS_ERROR_ELSEWHERE = """
import mmap, os, sys
from pileus.memory import Region
from pileus.memory._sigbus import Guard
fd = os.open(sys.argv[1], os.O_RDWR)
region = Region(fd, 8192)
guard = Guard(region.hva, 4096)
os.ftruncate(fd, 0)
memoryview(region)[0]
print("alive", flush=True)
memoryview(region)[4096]
"""


def test_elsewhere_the_signal_does_what_it_did(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    done = subprocess.run(
        [sys.executable, "-c", BUS_ERROR_ELSEWHERE, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "alive\n"
    assert done.returncode == -7, done.stderr

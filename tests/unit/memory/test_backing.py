"""What guest memory is made of."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.config.model import MemoryConfig
from pileus.errors import ConfigError, HostError
from pileus.memory import backing

MIB = 1 << 20
RANGES = [(0, 2 * MIB), (1 << 32, 4 * MIB)]


def config(**fields: Any) -> MemoryConfig:
    return MemoryConfig(size=6 * MIB, **fields)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def mappings() -> str:
    return Path("/proc/self/maps").read_text()


def test_memory_is_private_where_nobody_shares() -> None:
    with backing.allocate(config(), RANGES) as memory:
        assert memory.ranges == RANGES
        assert [region.fd for _, region in memory.regions] == [-1, -1]


def test_shared_memory_is_a_memfd_per_region() -> None:
    with backing.allocate(config(shared=True), RANGES) as memory:
        for _, region in memory.regions:
            assert os.readlink(f"/proc/self/fd/{region.fd}").startswith("/memfd:pileus-ram")
            assert os.fstat(region.fd).st_size == region.size
        memory.write(1 << 32, b"seen by all")
        assert os.pread(memory.regions[1][1].fd, 11, 0) == b"seen by all"


def test_a_file_holds_low_and_high_memory_one_behind_the_other(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.touch()
    with backing.allocate(config(file=str(path)), RANGES) as memory:
        memory.write(0, b"low")
        memory.write(1 << 32, b"high")
    data = path.read_bytes()
    assert len(data) == 6 * MIB
    assert (data[:3], data[2 * MIB : 2 * MIB + 4]) == (b"low", b"high")


def test_a_longer_file_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(10 * MIB)
    backing.allocate(config(file=str(path)), RANGES).close()
    assert path.stat().st_size == 10 * MIB


def test_a_folder_holds_memory_without_a_name(tmp_path: Path) -> None:
    with backing.allocate(config(file=str(tmp_path)), RANGES):
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["/dev/null", "/no/such/file"])
def test_what_cannot_hold_memory_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=f"--memory file {path}: .*an existing directory .* is needed"):
        backing.allocate(config(file=path), RANGES)


def test_too_few_huge_pages_are_counted() -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    size = (int(free.read_text()) + 8) * 2 * MIB
    before = mappings().count("pileus-ram")
    with pytest.raises(ConfigError, match=r"the host has \d+ free huge pages of 2048 KiB; see"):
        backing.allocate(MemoryConfig(size=size, hugepages=True), [(0, size)])
    assert mappings().count("pileus-ram") == before


def test_a_second_region_that_fails_gives_the_first_one_back() -> None:
    before = mappings().count("pileus-ram")
    with pytest.raises(HostError, match="cannot "):
        backing.allocate(config(shared=True), [(0, 2 * MIB), (1 << 32, 1 << 60)])
    assert mappings().count("pileus-ram") == before


def test_part_of_a_page_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.touch()
    with pytest.raises(ConfigError, match="--memory size 1000: a multiple of 4K, a page, is needed"):
        backing.allocate(MemoryConfig(size=1000, file=str(path)), [(0, 1000)])
    assert path.stat().st_size == 0


def test_part_of_a_huge_page_is_refused_by_its_size() -> None:
    if not Path("/sys/kernel/mm/hugepages/hugepages-1048576kB").exists():
        pytest.skip("this kernel has no huge pages of 1 GiB")
    huge = MemoryConfig(size=6 * MIB, hugepages=True, hugepage_size=1 << 30)
    with pytest.raises(ConfigError, match="--memory size 6M: a multiple of 1G, a page, is needed"):
        backing.allocate(huge, RANGES)


def test_huge_pages_that_no_host_has_are_named() -> None:
    huge = MemoryConfig(size=6 * MIB, hugepages=True, hugepage_size=64 << 10)
    with pytest.raises(ConfigError, match="--memory hugepage_size 64K: this host has no huge pages of that"):
        backing.allocate(huge, RANGES)


ORIGINS: dict[str, dict[str, Any]] = {
    "private": {},
    "shared": {"shared": True},
    "file": {"file": "ram"},
    "folder": {"file": "."},
}
WISHES = {"thp": True, "mergeable": True, "prefault": True}
STEPS = ("page_size_of", "Region", "GuestMemory", "os.stat", "os.memfd_create", "os.fstat", "os.ftruncate")


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
def test_whatever_fails_everything_is_given_back(
    origin: dict[str, Any], step: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ``nth`` call of ``step`` fails, if there is one; open files are compared by the fixture."""
    monkeypatch.chdir(tmp_path)
    Path("ram").touch()
    before, calls = mapped(), 0
    real = getattr(os, step[3:]) if step.startswith("os.") else getattr(backing, step)

    def failing(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, "injected")
        return real(*args, **more)

    monkeypatch.setattr(f"pileus.memory.backing.{step}", failing)
    try:
        backing.allocate(config(**origin, **WISHES), RANGES).close()
        told = "nothing failed"
    except (ConfigError, HostError, OSError) as error:
        told = str(error)
    monkeypatch.undo()
    assert mapped() == before
    assert (calls >= nth) == ("No space left" in told or "injected" in told), told


def mapped() -> int:
    """Bytes of address space, in steps that no allocator makes by the way."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096 // (2 * MIB)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_prefaulted_memory_is_present_from_the_start() -> None:
    before = resident()
    with backing.allocate(MemoryConfig(size=64 * MIB, prefault=True), [(0, 64 * MIB)]):
        assert resident() - before > 60 * MIB


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "made up")


def test_a_file_that_cannot_grow_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ftruncate", refuse)
    (tmp_path / "ram").touch()
    for wanted in (config(file=str(tmp_path)), config(file=str(tmp_path / "ram")), config(shared=True)):
        with pytest.raises(HostError, match=r"cannot grow to 2 MiB .*No space left"):
            backing.allocate(wanted, RANGES)
    assert os.listdir(tmp_path) == ["ram"]


def test_a_page_size_that_nobody_can_tell_leaves_no_fd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "page_size_of", refuse)
    with pytest.raises(OSError, match="made up"):
        backing.allocate(config(shared=True), RANGES)


def test_a_size_that_is_no_multiple_of_huge_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "page_size_of", lambda _: 4 * MIB)
    with pytest.raises(ConfigError, match="a multiple of 4M, a page, is needed"):
        backing.allocate(config(shared=True), RANGES)


def test_a_size_of_huge_pages_goes_to_the_memfd_as_its_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def memfd_create(name: str, flags: int) -> int:
        asked.append(flags)
        raise OSError(errno.ENODEV, "made up")

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    with pytest.raises(ConfigError, match="this host has no huge pages of that size"):
        backing.allocate(config(hugepages=True, hugepage_size=1 << 30), RANGES)
    assert asked == [os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_1GB]


def flags_of(hva: int) -> set[str]:
    """The kernel's flags of the mapping that begins at ``hva``; neighbours may have been merged with it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(each, 16) for each in first.split("-"))
            inside = low <= hva < high
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("thp", [True, False])
def test_transparent_huge_pages_are_a_wish_of_the_user(thp: bool) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    with backing.allocate(config(thp=thp, shared=True), RANGES) as memory:
        assert [("hg" in flags_of(region.hva)) for _, region in memory.regions] == [thp, thp]


def test_mergeable_memory_is_told_to_the_kernel() -> None:
    if not Path("/sys/kernel/mm/ksm").exists():
        pytest.skip("this kernel merges no pages")
    with backing.allocate(config(mergeable=True), RANGES) as memory:
        assert all("mg" in flags_of(region.hva) for _, region in memory.regions)


def test_who_shares_the_memory_cannot_make_it_shorter() -> None:
    with backing.allocate(config(shared=True), [(0, 4 * MIB)]) as memory:
        ((_, region),) = memory.regions
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, 0)
        assert memory.discard(0, MIB) == MIB

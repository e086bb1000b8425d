"""Guest memory as the guest sees it, and where it comes from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import Guest

NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
HUGEPAGES_TOTAL = 256  # of 2 MiB: the guest's 512 MiB


@pytest.fixture
def hugepages() -> Iterator[None]:
    before = NR_HUGEPAGES.read_text()
    NR_HUGEPAGES.write_text(str(int(before) + HUGEPAGES_TOTAL))
    got = int(NR_HUGEPAGES.read_text()) - int(before)
    if got < HUGEPAGES_TOTAL:
        NR_HUGEPAGES.write_text(before)
        pytest.skip(f"the host could set aside only {got} huge pages of {HUGEPAGES_TOTAL}")
    yield
    NR_HUGEPAGES.write_text(before)


@pytest.mark.usefixtures("hugepages")
def test_memory_can_be_huge_pages(start: StartGuest) -> None:
    guest: Guest = start(do="shell", memory="size=512M,hugepages=on")
    guest.shell()
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    assert free < int(NR_HUGEPAGES.read_text()), "the guest runs on other pages"
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


@pytest.mark.parametrize(
    "memory",
    [
        "size=512M,shared=on",
        "size=512M,file=/dev/shm",
        pytest.param("size=512M,thp=off", marks=pytest.mark.long),
    ],
)
def test_memory_boots_from_other_backings(start: StartGuest, memory: str) -> None:
    guest: Guest = start(memory=memory)
    assert guest.facts().number("memtotal_kb") > 460_000
    assert guest.wait() == 0


def test_memory_goes_on_above_the_32_bit_hole(start: StartGuest) -> None:
    guest: Guest = start(memory="size=4608M")
    assert guest.facts().number("memtotal_kb") > 4_400_000
    assert guest.wait() == 0

from itertools import pairwise
from typing import Any

import pytest

from pileus.boot.memory_map import RAM, RESERVED, memory_map

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BIOS = (0xF0000, 64 * KIB, RESERVED)
MMCONFIG = (0xE8000000, 256 * MIB, RESERVED)
LOW = (0, 640 * KIB, RAM)

MAPS = {
    512 * MIB: [LOW, BIOS, (MIB, 511 * MIB, RAM), MMCONFIG],
    3 * GIB: [LOW, BIOS, (MIB, 3 * GIB - MIB, RAM), MMCONFIG],
    3 * GIB + 4096: [LOW, BIOS, (MIB, 3 * GIB - MIB, RAM), MMCONFIG, (4 * GIB, 4096, RAM)],
    128 * GIB: [LOW, BIOS, (MIB, 3 * GIB - MIB, RAM), MMCONFIG, (4 * GIB, 125 * GIB, RAM)],
    512 * KIB: [(0, 512 * KIB, RAM), BIOS, MMCONFIG],
}


@pytest.mark.parametrize("size", MAPS)
def test_lists_ram_around_the_holes(make_memory: Any, size: int) -> None:
    assert memory_map(make_memory(size)) == MAPS[size]


@pytest.mark.parametrize("size", MAPS)
def test_ranges_ascend_and_do_not_overlap(make_memory: Any, size: int) -> None:
    entries = memory_map(make_memory(size))
    for (gpa, length, _), (following, _, _) in pairwise(entries):
        assert gpa + length <= following

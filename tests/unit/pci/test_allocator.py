"""Windows give out aligned pieces that do not overlap."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.errors import ConfigError
from pileus.pci.allocator import Window, allocate


def test_pieces_are_aligned_to_their_size() -> None:
    window = Window(0x1000, 0x10000)
    assert [window.allocate(size) for size in (0x1000, 0x4000, 0x1000, 0x8000)] == [
        0x1000,
        0x4000,
        0x2000,
        0x8000,
    ]
    assert window.allocate(0x8000) is None


def test_what_was_freed_is_given_again() -> None:
    window = Window(0, 0x2000)
    assert [window.allocate(0x1000), window.allocate(0x1000), window.allocate(0x1000)] == [0, 0x1000, None]
    window.free(0)
    assert window.allocate(0x1000) == 0
    with pytest.raises(ValueError, match="0x5"):
        window.free(5)


def test_the_next_window_is_taken_where_one_is_full() -> None:
    windows = [Window(0, 0x1000), Window(0x10000, 0x1000)]
    assert [allocate(windows, 0x1000), allocate(windows, 0x1000)] == [0, 0x10000]
    with pytest.raises(ConfigError, match="PCI devices of 0x1000 bytes: no room"):
        allocate(windows, 0x1000)


@given(st.integers(0, 2**40), st.integers(0, 2**20), st.lists(st.integers(4, 18), max_size=30))
def test_no_two_pieces_overlap(base: int, size: int, wanted: list[int]) -> None:
    window, taken = Window(base, size), []
    for bits in wanted:
        gpa = window.allocate(1 << bits)
        if gpa is not None:
            assert gpa % (1 << bits) == 0
            taken.append((gpa, gpa + (1 << bits)))
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert all(base <= start and end <= base + size for start, end in taken)

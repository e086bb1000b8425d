"""Nothing in the address space is in the way of anything else."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.layout import GIB, MIB

ram_sizes = st.integers(1, 128 << 9).map(lambda units: units * 2 * MIB)
pmem_sizes = st.lists(st.integers(1, 1 << 14).map(lambda units: units * 2 * MIB), max_size=32)
bits = st.integers(36, 52)


@given(ram_sizes, pmem_sizes, bits)
def test_persistent_memory_lies_between_ram_and_the_window_of_pci(
    ram: int, sizes: list[int], bits: int
) -> None:
    placed = layout.persistent_ranges(ram, sizes, bits)
    assert [size for _, size in placed] == sizes[: len(placed)]
    used_end = max((gpa + size for gpa, size in placed), default=0)
    window = layout.pci_mmio_64bit(ram, bits, used_end)
    spans = [*layout.ram_ranges(ram), (3 * GIB, GIB), *placed, *([window] if window else [])]
    for (gpa, size), (following, _) in pairwise(sorted(spans)):
        assert gpa + size <= following
    end = 1 << min(bits, 46)
    assert all(gpa % (128 * MIB) == 0 and gpa + size <= end for gpa, size in placed)
    if len(placed) < len(sizes):
        assert sum(sizes) + len(sizes) * 128 * MIB + max(ram, 3 * GIB) + GIB > end


@given(ram_sizes, pmem_sizes, bits)
def test_more_of_it_moves_none(ram: int, sizes: list[int], bits: int) -> None:
    """So that a guest finds the first where it was."""
    whole = layout.persistent_ranges(ram, sizes, bits)
    for count in range(len(whole)):
        assert layout.persistent_ranges(ram, sizes[:count], bits) == whole[:count]


def test_without_it_the_window_is_where_it_always_was() -> None:
    assert (
        layout.pci_mmio_64bit(GIB, 46)
        == layout.pci_mmio_64bit(GIB, 46, 0)
        == (64 * GIB, (64 << 40) - 64 * GIB)
    )


def test_flush_hints_are_in_nobodys_way() -> None:
    end = layout.NVDIMM_FLUSH + 32 * layout.PAGE_SIZE
    assert layout.VIRTIO_MMIO + layout.VIRTIO_MMIO_SIZE <= layout.NVDIMM_FLUSH
    assert end <= layout.IOAPIC

"""APIC ids follow the topology."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.arch.x86_64.topology import Topology

SMALL = st.integers(1, 9)


@given(SMALL, SMALL, SMALL, SMALL)
def test_apic_ids_rise_and_never_repeat(threads: int, cores: int, dies: int, packages: int) -> None:
    topology = Topology(threads, cores, dies, packages)
    ids = [topology.apic_id(index) for index in range(threads * cores * dies * packages)]
    assert ids == sorted(set(ids))
    assert ids[0] == 0


@given(SMALL, SMALL, SMALL, SMALL)
def test_a_shift_tells_the_package(threads: int, cores: int, dies: int, packages: int) -> None:
    topology = Topology(threads, cores, dies, packages)
    for index in range(threads * cores * dies * packages):
        assert topology.apic_id(index) >> topology.package_bits == index // topology.per_package


@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        ((1, 4, 1, 1), [0, 1, 2, 3]),
        ((2, 3, 1, 2), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]),  # three cores take two bits
        ((1, 1, 3, 2), [0, 1, 2, 4, 5, 6]),
    ],
)
def test_a_count_that_is_no_power_of_two_leaves_gaps(
    shape: tuple[int, int, int, int], ids: list[int]
) -> None:
    topology = Topology(*shape)
    assert [topology.apic_id(index) for index in range(len(ids))] == ids

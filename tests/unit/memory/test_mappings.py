"""What is mapped where: compared with a list of intervals."""

import errno

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pileus.memory._mappings import Mappings

LAST = (1 << 64) - 1
CHUNK = 256

Interval = tuple[int, int, int, int]


class Twin:
    """Slow, and as the specification says it."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []

    def map(self, first: int, last: int, gpa: int, access: int) -> int:
        if self._touching(first, last):
            return -errno.EEXIST
        self.intervals = sorted([*self.intervals, (first, last, gpa, access)])
        return 0

    def unmap(self, first: int, last: int) -> int:
        touching = self._touching(first, last)
        if any(each[0] < first or each[1] > last for each in touching):
            return -errno.ERANGE
        self.intervals = [each for each in self.intervals if each not in touching]
        return len(touching)

    def find(self, iova: int) -> Interval | None:
        return next(iter(self._touching(iova, iova)), None)

    def _touching(self, first: int, last: int) -> list[Interval]:
        return [each for each in self.intervals if each[0] <= last and each[1] >= first]


small = st.integers(0, 63)
edge = st.sampled_from([0, 1, 1 << 32, LAST - 1, LAST])
iovas = st.one_of(small, small, edge)


class Compare(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.mappings, self.twin = Mappings(), Twin()

    @rule(one=iovas, other=iovas, gpa=st.integers(0, LAST), access=st.integers(0, 3))
    def map(self, one: int, other: int, gpa: int, access: int) -> None:
        first, last = sorted((one, other))
        assert self.mappings.map(first, last, gpa, access) == self.twin.map(first, last, gpa, access)

    @rule(first=small)
    def map_one(self, first: int) -> None:
        assert self.mappings.map(first, first, 0, 0) == self.twin.map(first, first, 0, 0)

    @rule(one=iovas, other=iovas)
    def unmap(self, one: int, other: int) -> None:
        first, last = sorted((one, other))
        assert self.mappings.unmap(first, last) == self.twin.unmap(first, last)

    @rule(iova=iovas)
    def find(self, iova: int) -> None:
        assert self.mappings.find(iova) == self.twin.find(iova)

    @invariant()
    def same(self) -> None:
        assert list(self.mappings) == self.twin.intervals
        assert self.mappings.count == len(self.twin.intervals)


TestCompare = Compare.TestCase


@given(st.permutations(range(4)), st.integers(1, 4))
def test_thousands_in_any_order_are_found_and_removed(order: list[int], step: int) -> None:
    mappings = Mappings()
    count = 4 * CHUNK
    for part in order:
        for index in range(part, count, 4):
            assert mappings.map(index * 10, index * 10 + 4, index, 3) == 0
    assert [each[2] for each in mappings] == list(range(count))
    assert mappings.chunk_count <= 4 * count // CHUNK + 1
    for index in range(count):
        assert mappings.find(index * 10 + 4) == (index * 10, index * 10 + 4, index, 3)
        assert mappings.find(index * 10 + 5) is None
    for index in range(0, count, step):
        assert mappings.unmap(index * 10, index * 10 + 9) == 1
    assert [each[2] for each in mappings] == [index for index in range(count) if index % step]
    left = mappings.count
    assert mappings.unmap(0, LAST) == left
    assert list(mappings) == []
    assert mappings.chunk_count == 0


def test_a_driver_that_leaves_one_of_each_chunk_does_not_make_them_cost_more() -> None:
    mappings = Mappings()
    for index in range(64 * CHUNK):
        mappings.map(index, index, 0, 1)
    for index in range(64 * CHUNK):
        if index % CHUNK:
            mappings.unmap(index, index)
    assert mappings.count == 64
    assert mappings.chunk_count <= 2

"""The compiled queue and its slow twin on hostile rings: same chains, same faults, same memory."""

import os
from collections.abc import Iterator
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.errors import GuestError
from pileus.testing import make_memory
from pileus.virtio.queue import Chain, Queue
from pileus.virtio.queue._queue import F_EVENT_IDX, F_INDIRECT_DESC
from tests.unit.virtio.queue.queue_twin import QueueTwin, RingError, TwinMemory

PAGE = 4096
RANGES = [(0, 2 * PAGE), (2 * PAGE, PAGE), (8 * PAGE, PAGE), (1 << 32, PAGE)]  # neighbours, a hole, far away
TABLE, AVAILABLE, USED = 0, 0x400, 0x600
INDIRECT_TABLES = [0x800, 2 * PAGE - 48, 3 * PAGE - 64, 8 * PAGE]  # two end with their regions
EDGES = sorted(
    {edge for gpa, size in RANGES for edge in (gpa, gpa + size)} | {1 << 63, (1 << 64) - 1, *INDIRECT_TABLES}
)

gpas = st.one_of(
    st.sampled_from(EDGES).flatmap(
        lambda edge: st.integers(max(0, edge - 40), min(edge + 40, (1 << 64) - 1))
    ),
    st.sampled_from(INDIRECT_TABLES),
    st.integers(0, 3 * PAGE),
)
lengths = st.one_of(
    st.integers(0, 3).map(lambda count: 16 * count),
    st.sampled_from([0, 1, 15, 17, 100, PAGE, 2 * PAGE, 3 * PAGE, 3 * PAGE + 1, 1 << 31, (1 << 32) - 1]),
    st.integers(0, PAGE),
)
flags = st.one_of(st.integers(0, 7), st.sampled_from([1, 1, 2, 3, 4]), st.integers(0, 0xFFFF))
nexts = st.one_of(st.integers(0, 9), st.sampled_from([0xFFFF, 1 << 15]))
descriptors = st.tuples(gpas, lengths, flags, nexts)
kind_places = st.one_of(  # where a descriptor is written: the table or an indirect one
    st.integers(0, 8).map(lambda index: TABLE + 16 * index),
    st.tuples(st.sampled_from(INDIRECT_TABLES), st.integers(0, 2)).map(lambda pair: pair[0] + 16 * pair[1]),
)
words = st.one_of(st.integers(0, 12), st.integers(0, 0xFFFF))
operations = st.one_of(
    st.tuples(st.just("describe"), kind_places, descriptors),
    st.tuples(st.just("offer"), st.integers(0, 9)),
    st.tuples(st.just("jump"), words),
    st.tuples(st.just("event"), st.integers(-3, 3)),
    st.tuples(st.just("flags"), st.integers(0, 3)),
    st.tuples(st.just("take")),
    st.tuples(st.just("complete"), st.integers(0, 7), st.sampled_from([0, 1, 4096, (1 << 32) - 1])),
    st.tuples(st.just("publish")),
    st.tuples(st.just("listen")),
    st.tuples(st.just("serve")),
)
STARTS = [0, 1, 32767, 65530, 65535]


class Pair:
    """A compiled queue and a twin, each on its own copy of the same memory."""

    def __init__(self) -> None:
        self.memory = make_memory(RANGES)
        self.queue = Queue(8)
        self.queue.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.interrupts = 0

    def close(self) -> None:
        os.close(self.queue.call_fd)
        self.queue.close()
        self.memory.close()

    def start(self, size: int, start: int, indirect: bool, event_idx: bool) -> None:
        for gpa, length in RANGES:
            self.memory.write(gpa, bytes(length))
        self.interrupts = 0
        queue = self.queue
        queue.reset()
        queue.restore(
            {
                "size": size,
                "enabled": True,
                "descriptors": TABLE,
                "available": AVAILABLE,
                "used": USED,
                "next_avail": start,
                "next_used": start,
            }
        )
        queue.activate(self.memory, (F_INDIRECT_DESC if indirect else 0) | (F_EVENT_IDX if event_idx else 0))
        self.twin_memory = TwinMemory([(gpa, bytearray(length)) for gpa, length in RANGES])
        self.twin = QueueTwin(
            self.twin_memory,
            size,
            TABLE,
            AVAILABLE,
            USED,
            indirect=indirect,
            event_idx=event_idx,
            start=start,
        )
        self.available = start
        self.write(AVAILABLE + 2, pack("<H", start))
        self.flying: list[tuple[Chain, int]] = []

    def write(self, gpa: int, data: bytes) -> None:
        self.memory.write(gpa, data)
        place = self.twin_memory.locate(gpa)
        assert place is not None
        place[0][place[1] : place[1] + len(data)] = data

    def same(self) -> None:
        """Memory, interrupts and faults are the same."""
        for gpa, data in self.twin_memory.regions:
            assert self.memory.read(gpa, len(data)) == bytes(data)
        try:
            self.interrupts += os.eventfd_read(self.queue.call_fd)
        except BlockingIOError:
            pass
        assert self.interrupts == self.twin.interrupts
        assert self.queue.broken == self.twin.broken

    # -- the operations ----------------------------------------------------------------------------

    def describe(self, gpa: int, entry: tuple[int, int, int, int]) -> None:
        self.write(gpa, pack("<QIHH", *entry))

    def offer(self, head: int) -> None:
        self.write(AVAILABLE + 4 + 2 * (self.available % self.twin.size), pack("<H", head))
        self.jump(1)

    def jump(self, count: int) -> None:
        self.available = (self.available + count) % 65536
        self.write(AVAILABLE + 2, pack("<H", self.available))

    def event(self, distance: int) -> None:
        self.write(AVAILABLE + 4 + 2 * self.twin.size, pack("<H", (self.twin.completed + distance) % 65536))

    def flags(self, value: int) -> None:
        self.write(AVAILABLE, pack("<H", value))

    def take(self) -> bool:
        """Whether there was a chain, the same for both."""
        try:
            expected = self.twin.take()
        except RingError as error:
            with pytest.raises(GuestError, match=f"^{error}$"):
                self.queue.pop()
            return False
        chain = self.queue.pop()
        if expected is None:
            assert chain is None
            return False
        assert chain is not None
        assert chain.head == expected.head
        assert chain.ranges == expected.buffers
        assert chain.readable_len == sum(length for _, length, writing in expected.buffers if not writing)
        assert chain.writable_len == sum(length for _, length, writing in expected.buffers if writing)
        self.flying.append((chain, expected.head))
        return True

    def complete(self, which: int, length: int) -> None:
        if self.flying:
            chain, head = self.flying.pop(which % len(self.flying))
            self.queue.push_used(chain, length)
            self.twin.complete(head, length)

    def publish(self) -> None:
        self.queue.notify()
        self.twin.publish()

    def listen(self) -> None:
        assert self.queue.listen() == self.twin.enable_kicks()

    def serve(self) -> None:
        """What a device's handle_queue does."""
        left = self.twin.size
        try:
            for chain in self.queue:
                self.queue.push_used(chain, 7)
        except GuestError:
            pass
        try:
            while left:
                self.twin.disable_kicks()
                while left and (taken := self.twin.take()) is not None:
                    self.twin.complete(taken.head, 7)
                    left -= 1
                if not left or not self.twin.enable_kicks():
                    return
        except RingError:
            pass


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@settings(max_examples=600)
@given(
    size=st.sampled_from([1, 2, 4, 8]),
    start=st.sampled_from(STARTS),
    indirect=st.booleans(),
    event_idx=st.booleans(),
    table=st.lists(descriptors, max_size=8),
    steps=st.lists(operations, max_size=30),
)
def test_the_queue_does_as_its_twin(
    pair: Pair,
    size: int,
    start: int,
    indirect: bool,
    event_idx: bool,
    table: list[tuple[int, int, int, int]],
    steps: list[tuple[Any, ...]],
) -> None:
    pair.start(size, start, indirect, event_idx)
    for index, entry in enumerate(table):
        pair.describe(TABLE + 16 * index, entry)
    for name, *arguments in steps:
        getattr(pair, name)(*arguments)
        pair.same()
    pair.serve()
    pair.publish()
    pair.same()

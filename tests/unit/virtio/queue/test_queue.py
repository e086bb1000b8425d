"""A virtqueue on the device's side: chains, faults, and who tells whom."""

import os
from collections.abc import Iterator

import pytest

from pileus.errors import GuestError
from pileus.testing import F_INDIRECT, F_NEXT, F_WRITE, Heap, Ring, Used, make_memory
from pileus.testing.ring import DESCRIPTOR
from pileus.virtio.queue import Queue
from pileus.virtio.queue._queue import F_EVENT_IDX, F_INDIRECT_DESC

MIB = 1 << 20
MOST = 1024  # buffers of a chain
RANGES = [(0, MIB), (MIB, MIB), (4 * MIB, MIB)]  # two neighbours, a hole, a third
HOLE = 2 * MIB


class Bench:
    """A queue of 8, and the driver's half of it."""

    def __init__(self, event_idx: bool = True, indirect: bool = True, start: int = 0, size: int = 8) -> None:
        self.memory = make_memory(RANGES)
        self.ring = Ring(Heap(self.memory, 0x1000, MIB - 0x1000), size, event_idx)
        self.queue = Queue(size)
        self.queue.call_fd = self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.queue.restore(
            {
                "size": size,
                "enabled": True,
                "descriptors": self.ring.descriptors,
                "available": self.ring.available,
                "used": self.ring.used_ring,
                "next_avail": start,
                "next_used": start,
            }
        )
        self.ring.set_available(start)
        self.ring.next_used = self.ring.kicked_at = start
        self.memory.write(self.ring.used_ring + 2, start.to_bytes(2, "little"))
        features = (F_EVENT_IDX if event_idx else 0) | (F_INDIRECT_DESC if indirect else 0)
        self.queue.activate(self.memory, features)

    def serve(self, count: int = 1) -> None:
        """Take and give back ``count`` chains, and tell the driver."""
        for _ in range(count):
            chain = self.queue.pop()
            assert chain is not None
            self.queue.push_used(chain)
        self.queue.notify()

    def interrupts(self) -> int:
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.queue.close()
        os.close(self.call_fd)
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture(params=[0, 65530], ids=["from 0", "across 65536"])
def by_event(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(event_idx=True, start=request.param)
    yield bench
    bench.close()


@pytest.fixture(params=[0, 65530], ids=["from 0", "across 65536"])
def by_flag(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(event_idx=False, start=request.param)
    yield bench
    bench.close()


# -- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_chain_is_its_buffers_in_order(bench: Bench, indirect: bool) -> None:
    head = bench.ring.add([b"one", b"three"], [4, 2], indirect)
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.head == head
    assert chain.ranges == [(each.gpa, each.size, each.writable) for each in bench.ring.blocks(head)]
    assert (chain.readable_len, chain.writable_len) == (8, 6)
    assert chain.read() == b"onethree"
    assert chain.read(4, offset=2) == b"ethr"
    assert chain.read(9, offset=8) == b""
    assert chain.write(b"abcdefgh", offset=1) == 5
    assert chain.write(b"!", offset=6) == 0
    assert bench.ring.read(head) == b"\0abcde"
    bench.queue.push_used(chain, 6)
    bench.queue.notify()
    assert bench.ring.take_used() == [Used(head, 6)]
    assert bench.queue.pop() is None


def test_a_buffer_may_span_neighbouring_regions(bench: Bench) -> None:
    bench.ring.write_descriptor(0, MIB - 3, 5, F_WRITE)
    bench.ring.offer(0)
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.ranges == [(MIB - 3, 3, True), (MIB, 2, True)]
    assert chain.write(b"hello") == 5
    assert bench.memory.read(MIB - 3, 3) + bench.memory.read(MIB, 2) == b"hello"


def test_an_indirect_table_may_end_a_chain_of_direct_ones(bench: Bench) -> None:
    bench.memory.write(0x100, DESCRIPTOR.pack(0x200, 5, F_WRITE, 0))
    bench.ring.write_descriptor(0, 0x300, 7, F_NEXT, 1)
    bench.ring.write_descriptor(1, 0x100, 16, F_INDIRECT | F_WRITE)  # the flag of a table is ignored
    bench.ring.offer(0)
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.ranges == [(0x300, 7, False), (0x200, 5, True)]


def test_empty_buffers_are_none(bench: Bench) -> None:
    bench.ring.write_descriptor(0, 1 << 63, 0, F_NEXT, 1)
    bench.ring.write_descriptor(1, 0x100, 4)
    bench.ring.offer(0)
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.ranges == [(0x100, 4, False)]


def test_a_chain_put_back_comes_again(bench: Bench) -> None:
    head = bench.ring.add([b"x"], [], False)
    first = bench.queue.pop()
    assert first is not None
    bench.queue.unpop(first)
    bench.queue.push_used(first)  # it is not ours any more
    bench.queue.notify()
    assert bench.ring.take_used() == []
    again = bench.queue.pop()
    assert again is not None
    assert again.head == head
    assert bench.queue.pop() is None


def test_a_chain_is_given_back_once(bench: Bench) -> None:
    bench.ring.add([b"x"], [], False)
    chain = bench.queue.pop()
    assert chain is not None
    bench.queue.push_used(chain)
    bench.queue.push_used(chain)
    bench.queue.notify()
    assert len(bench.ring.take_used()) == 1


def test_a_chain_of_before_a_reset_is_forgotten(bench: Bench) -> None:
    bench.ring.add([b"x"], [], False)
    chain = bench.queue.pop()
    state = bench.queue.state()
    bench.queue.reset()
    bench.queue.restore(state)
    bench.queue.activate(bench.memory, 0)
    assert chain is not None
    bench.queue.push_used(chain)
    bench.queue.notify()
    assert bench.ring.used_index == 0


def test_what_is_written_is_marked_dirty(bench: Bench) -> None:
    bench.memory.start_tracking()
    bench.ring.write_descriptor(0, 4 * MIB + 4095, 2, F_WRITE)
    bench.ring.offer(0)
    chain = bench.queue.pop()
    assert chain is not None
    chain.write(b"ab")
    assert bench.memory.take_dirty(2)[0] == 0b11
    bench.queue.push_used(chain, 1)
    assert bench.memory.take_dirty(2)[0] == 0b01
    bench.memory.take_dirty(0)
    bench.queue.notify()
    assert any(bench.memory.take_dirty(0))
    bench.queue.listen()
    assert any(bench.memory.take_dirty(0))


# -- a driver that serves itself for ever ----------------------------------------------------------


def test_one_kick_is_worth_one_ring_of_chains() -> None:
    bench = Bench(size=4)
    served = 0
    bench.ring.add([b"x"], [], False)
    for chain in bench.queue:
        bench.queue.push_used(chain)
        bench.queue.notify()
        bench.ring.take_used()
        bench.ring.add([b"x"], [], False)  # there is always one more
        served += 1
    assert served == 4
    assert os.eventfd_read(bench.queue.kick_fd) == 1  # and it goes on when others had their turn
    bench.close()


# -- faults ---------------------------------------------------------------------------------------

Entry = tuple[int, int, int, int]
BAD_CHAINS: dict[str, tuple[list[Entry], list[Entry], str]] = {
    # what is wrong: (descriptors from 0, the indirect table at 0x100, the fault)
    "loops to itself": ([(0, 1, F_NEXT, 0)], [], "loop"),
    "loops in a circle": ([(0, 1, F_NEXT, 1), (0, 1, F_NEXT, 2), (0, 1, F_NEXT, 1)], [], "loop"),
    "loops without a byte": ([(0, 0, F_NEXT, 0)], [], "loop"),
    "next outside": ([(0, 1, F_NEXT, 8)], [], "next is outside"),
    "in the hole": ([(HOLE, 1, 0, 0)], [], "not guest memory"),
    "into the hole": ([(HOLE - 1, 2, 0, 0)], [], "not guest memory"),
    "out of the hole": ([(4 * MIB - 1, 2, 0, 0)], [], "not guest memory"),
    "past the end": ([(5 * MIB, 1, 0, 0)], [], "not guest memory"),
    "all of 32 bits": ([(0, (1 << 32) - 1, 0, 0)], [], "not guest memory"),
    "wraps at 2^64": ([((1 << 64) - 1, 2, 0, 0)], [], "not guest memory"),
    "readable last": ([(0, 1, F_WRITE | F_NEXT, 1), (0, 1, 0, 0)], [], "reads comes after"),
    "readable last, empty": ([(0, 0, F_WRITE | F_NEXT, 1), (0, 0, 0, 0)], [], "reads comes after"),
    "indirect, chained": ([(0x100, 16, F_INDIRECT | F_NEXT, 1)], [(0, 1, 0, 0)], "has a next"),
    "indirect, empty": ([(0x100, 0, F_INDIRECT, 0)], [], "empty or not a multiple"),
    "indirect, odd": ([(0x100, 17, F_INDIRECT, 0)], [(0, 1, 0, 0)], "empty or not a multiple"),
    "indirect in the hole": ([(HOLE, 16, F_INDIRECT, 0)], [], "not guest memory"),
    "indirect into the hole": ([(HOLE - 16, 32, F_INDIRECT, 0)], [], "not guest memory"),
    "indirect of 4 GiB": ([(0, 0xFFFFFFF0, F_INDIRECT, 0)], [], "not guest memory"),
    "indirect in indirect": ([(0x100, 16, F_INDIRECT, 0)], [(0x100, 16, F_INDIRECT, 0)], "in it"),
    "indirect with a loop": ([(0x100, 16, F_INDIRECT, 0)], [(0, 1, F_NEXT, 0)], "loop"),
    "indirect, next outside": ([(0x100, 16, F_INDIRECT, 0)], [(0, 1, F_NEXT, 1)], "next is outside"),
}


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_a_bad_chain_stops_the_queue(bench: Bench, name: str) -> None:
    entries, table, fault = BAD_CHAINS[name]
    for index, (gpa, length, flags, following) in enumerate(entries):
        bench.ring.write_descriptor(index, gpa, length, flags, following)
    bench.memory.write(0x100, b"".join(DESCRIPTOR.pack(*entry) for entry in table))
    bench.ring.offer(0)
    for _ in range(2):  # and it stays stopped
        with pytest.raises(GuestError, match=fault):
            bench.queue.pop()
    assert fault in (bench.queue.broken or "")


def test_a_head_outside_the_table_stops_the_queue(bench: Bench) -> None:
    bench.ring.offer(8)
    with pytest.raises(GuestError, match="head is outside"):
        bench.queue.pop()


@pytest.mark.parametrize("start", [0, 65535])
@pytest.mark.parametrize("jump", [9, 32768, 65535])
def test_an_index_that_jumps_stops_the_queue(jump: int, start: int) -> None:
    bench = Bench(start=start)
    bench.ring.set_available(start + jump)
    with pytest.raises(GuestError, match="jumped"):
        bench.queue.pop()
    bench.close()


def test_an_index_may_not_pass_chains_in_flight(bench: Bench) -> None:
    for _ in range(8):
        bench.ring.add([b"x"], [], False)
    assert bench.queue.pop() is not None
    bench.ring.set_available(9)  # the ring is full, and none came back
    for _ in range(7):
        assert bench.queue.pop() is not None
    with pytest.raises(GuestError, match="jumped"):
        bench.queue.pop()


def test_an_index_that_goes_back_under_chains_in_flight_stops_the_queue(bench: Bench) -> None:
    for _ in range(3):
        bench.ring.add([b"x"], [], False)
    for _ in range(3):
        assert bench.queue.pop() is not None
    bench.ring.set_available(1)  # less than was taken, more than was given back
    with pytest.raises(GuestError, match="jumped"):
        bench.queue.pop()


def test_indirect_that_was_not_negotiated_stops_the_queue() -> None:
    bench = Bench(indirect=False)
    bench.ring.add([b"x"], [], True)
    with pytest.raises(GuestError, match="without being negotiated"):
        bench.queue.pop()
    bench.close()


def table_of(bench: Bench, count: int, length: int) -> None:
    """Offer an indirect table of ``count`` buffers of ``length`` bytes each."""
    gpa = 4 * MIB
    for index in range(count):
        last = index == count - 1
        entry = DESCRIPTOR.pack(0x100, length, 0 if last else F_NEXT, 0 if last else index + 1)
        bench.memory.write(gpa + 16 * index, entry)
    bench.ring.write_descriptor(0, gpa, 16 * count, F_INDIRECT)
    bench.ring.offer(0)


def test_a_chain_has_as_many_buffers_as_one_system_call_takes(bench: Bench) -> None:
    table_of(bench, MOST, 1)
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.readable_len == MOST


@pytest.mark.parametrize("length", [0, 1])
def test_a_longer_chain_stops_the_queue(bench: Bench, length: int) -> None:
    table_of(bench, MOST + 1, length)
    with pytest.raises(GuestError, match="more than 1024"):
        bench.queue.pop()


BAD_RINGS = {
    "size 0": {"size": 0},
    "size no power of two": {"size": 3},
    "size beyond the limit": {"size": 16},
    "descriptors unaligned": {"descriptors": 8},
    "available unaligned": {"available": 1},
    "used unaligned": {"used": 2},
    "descriptors in the hole": {"descriptors": HOLE},
    "descriptors into the hole": {"descriptors": HOLE - 64},
    "available past the end": {"available": 5 * MIB - 20},
    "used far away": {"used": (1 << 64) - 64},
}


@pytest.mark.parametrize("wrong", BAD_RINGS.values(), ids=list(BAD_RINGS))
def test_rings_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with make_memory(RANGES) as memory:
        queue = Queue(8)
        good = {"size": 8, "enabled": 1, "descriptors": 0x1000, "available": 0x2000, "used": 0x3000}
        queue.restore(good | {"next_avail": 0, "next_used": 0} | wrong)
        with pytest.raises(GuestError):
            queue.activate(memory, 0)
        assert not queue.active
        assert queue.pop() is None
        assert list(queue) == []
        queue.notify()
        assert not queue.listen()
        queue.close()


def test_rings_may_end_with_their_region() -> None:
    with make_memory(RANGES) as memory:
        queue = Queue(8)
        good = {"descriptors": HOLE - 128, "available": 5 * MIB - 22, "used": HOLE - 128 - 72}
        queue.restore({"size": 8, "enabled": 1, "next_avail": 0, "next_used": 0} | good)
        queue.activate(memory, F_EVENT_IDX)
        assert not queue.listen()
        queue.close()


# -- who tells whom -------------------------------------------------------------------------------


def test_with_event_idx_an_interrupt_comes_where_it_was_asked_for(by_event: Bench) -> None:
    ring = by_event.ring
    for _ in range(12):
        for _ in range(4):
            ring.add([b"x"], [], False)
        ring.set_used_event(ring.next_used + 2)
        by_event.serve(2)
        assert by_event.interrupts() == 0
        by_event.serve(1)  # the third
        assert by_event.interrupts() == 1
        by_event.serve(1)
        assert by_event.interrupts() == 0
        assert len(ring.take_used()) == 4


def test_with_event_idx_one_interrupt_tells_of_a_batch(by_event: Bench) -> None:
    for _ in range(8):
        by_event.ring.add([b"x"], [], False)
    by_event.ring.set_used_event(by_event.ring.next_used + 3)
    by_event.serve(8)
    assert by_event.interrupts() == 1


def test_with_event_idx_kicks_are_wanted_after_listen_only(by_event: Bench) -> None:
    ring, queue = by_event.ring, by_event.queue
    for _ in range(12):
        assert not queue.listen()
        ring.kicked_at = ring.next_available
        ring.add([b"x"], [], False)
        assert ring.wants_kick
        ring.kicked_at = ring.next_available
        ring.add([b"x"], [], False)
        assert not ring.wants_kick  # it was told, and is on its way
        assert queue.listen()
        by_event.serve(2)
        ring.take_used()


def test_the_flag_asks_for_no_interrupts(by_flag: Bench) -> None:
    for wanted in (True, False, True):
        by_flag.ring.set_no_interrupt(not wanted)
        by_flag.ring.add([b"x"], [], False)
        by_flag.serve()
        assert by_flag.interrupts() == wanted
        by_flag.ring.take_used()


def test_the_flag_asks_for_no_kicks_while_chains_are_served(by_flag: Bench) -> None:
    ring = by_flag.ring
    ring.add([b"x"], [], False)
    assert ring.wants_kick
    for chain in by_flag.queue:
        assert not ring.wants_kick
        by_flag.queue.push_used(chain)
    assert ring.wants_kick


def test_nothing_new_is_no_interrupt(by_flag: Bench) -> None:
    by_flag.queue.notify()
    assert by_flag.interrupts() == 0

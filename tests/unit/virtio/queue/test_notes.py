"""What a queue notes of chains under way, for the process after it."""

import os
import struct
from collections.abc import Iterator
from itertools import chain as joined
from random import Random

import pytest

from pileus.errors import GuestError
from pileus.memory import GuestMemory, Region
from pileus.testing import Heap, Ring, make_memory
from pileus.virtio.queue import Queue
from pileus.virtio.queue._queue import F_EVENT_IDX

MIB = 1 << 20
SIZE = 8
ROOM = 16 + 16 * SIZE
OFFSET = 64


class Machine:
    """A driver, the memory it shares, and queues that come and go."""

    def __init__(self, start: int = 0) -> None:
        self.memory: GuestMemory = make_memory([(0, MIB)])
        self.ring = Ring(Heap(self.memory, 0x1000, MIB - 0x1000), SIZE, True)
        self.ring.set_available(start)
        self.ring.next_used = self.ring.kicked_at = start
        self.memory.write(self.ring.used_ring + 2, start.to_bytes(2, "little"))
        fd = os.memfd_create("notes", os.MFD_CLOEXEC)
        os.ftruncate(fd, OFFSET + ROOM)
        self.notes = Region(fd, OFFSET + ROOM)
        self.queues: list[Queue] = []

    def queue(self, base: int | None = None) -> Queue:
        """The next process's."""
        queue = Queue(SIZE)
        self.queues.append(queue)
        used = self.ring.used_index
        queue.restore(
            {
                "size": SIZE, "enabled": True, "descriptors": self.ring.descriptors,
                "available": self.ring.available, "used": self.ring.used_ring,
                "next_avail": used if base is None else base, "next_used": used,
            }
        )  # fmt: skip
        queue.activate(self.memory, F_EVENT_IDX)
        queue.keep_notes(self.notes, OFFSET)
        return queue

    def add(self, data: bytes, room: int = 0) -> int:
        """Offer a chain; its head."""
        return self.ring.add([data], [room] if room else [], False)

    def header(self) -> tuple[int, ...]:
        """Version, descriptors, head of the last batch, used index."""
        return struct.unpack_from("<HHHH", memoryview(self.notes), OFFSET + 8)

    def under_way(self) -> set[int]:
        with memoryview(self.notes) as view:
            return {head for head in range(SIZE) if view[OFFSET + 16 + 16 * head]}

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.notes.close()
        self.memory.close()


@pytest.fixture(params=[0, 65530], ids=["from 0", "across 65536"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(request.param)
    yield machine
    machine.close()


def test_what_was_taken_and_not_given_back_is_taken_again_in_its_order(machine: Machine) -> None:
    heads = [machine.add(b"%d" % count) for count in range(6)]
    first = machine.queue()
    chains = [first.pop() for _ in range(4)]
    assert machine.under_way() == set(heads[:4])
    for index in (2, 0):
        chain = chains[index]
        assert chain is not None
        first.push_used(chain)
    first.notify()
    assert machine.under_way() == {heads[1], heads[3]}
    second = machine.queue()
    again = [second.pop() for _ in range(5)]
    assert [chain and chain.head for chain in again] == [heads[1], heads[3], heads[4], heads[5], None]
    for chain in again[:4]:
        assert chain is not None
        second.push_used(chain)
    second.notify()
    assert {used.head for used in machine.ring.take_used()} == set(heads)
    assert machine.under_way() == set()
    assert machine.queue().pop() is None


def test_what_was_given_back_but_not_shown_is_taken_again(machine: Machine) -> None:
    head = machine.add(b"x")
    first = machine.queue()
    chain = first.pop()
    assert chain is not None
    first.push_used(chain)
    second = machine.queue()
    again = second.pop()
    assert again is not None
    assert again.head == head


def test_what_was_shown_but_is_still_noted_is_not_taken_again(machine: Machine) -> None:
    """As if the process ended between the two stores."""
    heads = [machine.add(b"x") for _ in range(3)]
    first = machine.queue()
    chains = [first.pop() for _ in range(3)]
    assert chains[1] is not None
    first.push_used(chains[1])
    before = bytes(memoryview(machine.notes))
    assert chains[2] is not None
    first.push_used(chains[2])
    first.notify()
    with memoryview(machine.notes) as view:
        for head in heads[1:]:
            view[OFFSET + 16 + 16 * head] = 1
        view[OFFSET + 14 : OFFSET + 16] = before[OFFSET + 14 : OFFSET + 16]
    second = machine.queue()
    again = second.pop()
    assert again is not None
    assert again.head == heads[0]
    assert second.pop() is None


def test_a_chain_that_goes_back_is_found_again(machine: Machine) -> None:
    machine.add(b"a")
    machine.add(b"b")
    first = machine.queue()
    first.pop()
    chain = first.pop()
    assert chain is not None
    first.unpop(chain)
    assert len(machine.under_way()) == 1
    second = machine.queue()
    for _ in range(2):
        chain = second.pop()
        assert chain is not None
        assert chain.read() == b"a"
        second.unpop(chain)
    assert [each and each.read() for each in (second.pop(), second.pop(), second.pop())] == [b"a", b"b", None]


def test_no_death_of_a_process_loses_or_doubles_a_chain() -> None:
    """Each chain is served at least once, given back exactly once, and the first time in its order."""
    chance = Random(7)
    machine = Machine(65000)
    offered: list[int] = []
    returned: list[int] = []
    seen: list[int] = []
    queue, held = machine.queue(), []
    for _ in range(3000):
        while machine.ring.in_flight < SIZE // 2 and chance.random() < 0.7:
            machine.add(struct.pack("<I", len(offered)), 4)
            offered.append(len(offered))
        for _ in range(chance.randrange(4)):
            if (chain := queue.pop()) is not None:
                number = struct.unpack("<I", chain.read())[0]
                seen.append(number)
                held.append((number, chain))
        chance.shuffle(held)
        for _ in range(chance.randrange(3)):
            if held:
                number, chain = held.pop()
                chain.write(struct.pack("<I", number))
                queue.push_used(chain)
        if chance.random() < 0.8:
            queue.notify()
        for used in machine.ring.take_used():
            returned.append(struct.unpack("<I", machine.ring.read(used.head))[0])
        if chance.random() < 0.05:
            queue.reset()
            queue, held = machine.queue(), []
    assert len(returned) == len(set(returned)) > 500
    firsts = list(dict.fromkeys(seen))
    assert firsts == sorted(firsts)
    assert set(returned) <= set(firsts)
    for _ in range(100):
        for chain in iter(queue.pop, None):
            held.append((0, chain))
    assert machine.ring.in_flight == len(held)
    machine.close()


def test_notes_on_another_size_are_begun_anew_while_nothing_is_under_way(machine: Machine) -> None:
    machine.queue()
    with memoryview(machine.notes) as view:
        view[OFFSET + 10] = 4
    machine.queue()
    assert machine.header()[:2] == (1, SIZE)
    with memoryview(machine.notes) as view:
        view[OFFSET + 10], view[OFFSET + 16] = 4, 1
    with pytest.raises(GuestError, match="notes of version 1 on 4 descriptors, not 8"):
        machine.queue()


@pytest.mark.parametrize("offset", [4, OFFSET + 8, 1 << 40, (1 << 64) - 8])
def test_notes_lie_within_their_region(machine: Machine, offset: int) -> None:
    queue = machine.queue()
    with pytest.raises(GuestError, match="no room for notes"):
        queue.keep_notes(machine.notes, offset)


def test_notes_of_a_stranger_harm_nobody(machine: Machine) -> None:
    """Whatever they hold, chains are checked as ever, and stores stay inside."""
    chance = Random(1)
    for _ in range(200):
        with memoryview(machine.notes) as view:
            view[OFFSET:] = chance.randbytes(ROOM)
            view[OFFSET + 8 : OFFSET + 12] = struct.pack("<HH", chance.randrange(2), SIZE)
            kept = bytes(view[:OFFSET])
        queue = machine.queue()
        try:
            for chain in joined(iter(queue.pop, None)):
                queue.push_used(chain)
            queue.notify()
        except GuestError:
            pass
        assert bytes(memoryview(machine.notes))[:OFFSET] == kept

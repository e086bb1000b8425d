"""Writes that are verified in the end, whatever happens to the back-end meanwhile."""

import random
import struct
import threading
import time

from pileus.testing import FakeDriver
from tests.unit.virtio.devices.disks import IN, OK, OUT, SECTOR, header

BLOCK = 4096
BLOCKS = 256  # of each queue
DEPTH = 16  # writes under way in each


def pattern(block: int, count: int) -> bytes:
    return struct.pack("<II", block, count) * (BLOCK // 8)


class Writer(threading.Thread):
    """Keeps DEPTH writes under way in each of ``queues``, of lengths that complete out of order.

    No two of them are to one block, so what was acknowledged last is what the disk has to hold.
    """

    def __init__(self, driver: FakeDriver, queues: int) -> None:
        super().__init__()
        self.driver = driver
        self.queues = queues
        self.written: dict[int, int] = {}  # block -> count, as acknowledged
        self.rounds = 0
        self.over = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            chance = random.Random(4)
            under_way: list[dict[int, tuple[int, int]]] = [{} for _ in range(self.queues)]
            while not self.over:
                for queue in range(self.queues):
                    self._offer(queue, under_way[queue], chance)
                for queue in range(self.queues):
                    self._collect(queue, under_way[queue])
            for queue in range(self.queues):
                while under_way[queue]:
                    self._collect(queue, under_way[queue])
        except BaseException as error:
            self.failure = error

    def _offer(self, queue: int, under_way: dict[int, tuple[int, int]], chance: random.Random) -> None:
        busy = {block for block, _ in under_way.values()}
        while len(under_way) < DEPTH:
            block = chance.randrange(BLOCKS) * self.queues + queue
            if block in busy:
                continue
            busy.add(block)
            self.rounds += 1
            data = pattern(block, self.rounds)
            head = self.driver.add([header(OUT, block * BLOCK // SECTOR), data], [1], queue=queue)
            under_way[head] = (block, self.rounds)
        self.driver.kick(queue)

    def _collect(self, queue: int, under_way: dict[int, tuple[int, int]]) -> None:
        for used in self.driver.wait(queue, timeout=60):
            assert self.driver.read(used.head, queue) == bytes([OK])
            block, count = under_way.pop(used.head)
            self.written[block] = count

    def finish(self) -> None:
        """Write on for a while, then end, and see that the disk holds what was acknowledged."""
        before = self.rounds
        deadline = time.monotonic() + 60
        while self.rounds < before + 100 and self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.over = True
        self.join(60)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure
        assert len(self.written) > BLOCKS // 4
        for block, count in self.written.items():
            head = self.driver.add([header(IN, block * BLOCK // SECTOR)], [BLOCK, 1])
            self.driver.kick()
            self.driver.wait()
            assert self.driver.read(head) == pattern(block, count) + bytes([OK])

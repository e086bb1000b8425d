"""Rings that hypothesis makes in bulk: many from one string of bytes, each held against the twin."""

from pileus.errors import GuestError
from pileus.testing import make_memory
from pileus.testing._hostile import RANGES, HostileDriver
from tests.unit.virtio.queue.queue_twin import QueueTwin, RingError, TwinMemory

BLOB = 6000  # bytes: hypothesis makes no more than 8 KiB of choices for one example


class Judge:
    """Decodes strings into rings, in guarded memory, and takes their chains with queue and twin."""

    def __init__(self) -> None:
        self.memory = make_memory(RANGES, guarded=True)
        self.driver = HostileDriver(self.memory)
        self.views = [self.memory.view(gpa, size) for gpa, size in RANGES]
        self.twin_memory = TwinMemory(
            [(gpa, view) for (gpa, _), view in zip(RANGES, self.views, strict=True)]
        )
        self.faults: dict[str, int] = {}

    def close(self) -> None:
        self.driver.close()
        for view in self.views:
            view.release()
        self.memory.close()

    def judge(self, data: bytes) -> int:
        """All rings of ``data``; how many they were."""
        before = self.driver.rings
        self.driver.feed(data)
        while self.driver.build():
            fault = self._compare()
            if fault:
                self.faults[fault] = self.faults.get(fault, 0) + 1
        return self.driver.rings - before

    def _compare(self) -> str | None:
        """Nobody completes a chain here, so that memory stands still for both; the fault they found."""
        queue = self.driver.queue
        twin = QueueTwin(
            self.twin_memory,
            queue.size,
            queue.descriptors,
            queue.available,
            queue.used,
            indirect=self.driver.indirect,
            event_idx=self.driver.event_idx,
            start=self.driver.start,
        )
        while True:
            expected, fault = None, None
            try:
                expected = twin.take()
            except RingError as error:
                fault = str(error)
            try:
                chain = queue.pop()
            except GuestError as error:
                assert str(error) == fault, f"{error} is no fault to the twin, {fault} is"  # noqa: PT017
                return fault
            assert fault is None, f"the queue misses that {fault}"
            if chain is None or expected is None:
                assert chain is None
                assert expected is None
                return None
            assert (chain.head, chain.ranges) == (expected.head, expected.buffers)

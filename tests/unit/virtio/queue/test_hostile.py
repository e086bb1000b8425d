"""Rings in bulk, which ``fuzz/rings.py`` makes a million of."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pileus.testing import make_memory
from pileus.testing._hostile import RANGES, HostileDriver
from pileus.virtio.queue._queue import FAULTS
from tests.unit.virtio.queue.derived import BLOB, Judge

UNREACHED = {"the host has no memory for a chain", "its rings are not mapped by the virtual IOMMU"}


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_a_hundred_thousand_hostile_rings_break_no_promise(tracked: bool) -> None:
    with make_memory(RANGES, guarded=True) as memory:
        if tracked:
            memory.start_tracking()
        driver = HostileDriver(memory, seed=2026)
        assert driver.run(100_000) == 100_000
        assert set(driver.faults) == set(FAULTS.values()) - UNREACHED
        assert driver.chains > 50_000
        driver.close()


def test_rings_that_change_while_they_are_read_break_no_promise() -> None:
    with make_memory(RANGES, guarded=True) as memory:
        driver, other = HostileDriver(memory, seed=1), HostileDriver(memory, seed=2)
        done = threading.Event()

        def scribble() -> None:
            while not done.is_set():
                other.scribble(10_000)

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            driver.run(50_000)
        finally:
            done.set()
            thread.join()
        assert driver.chains > 10_000
        driver.close()
        other.close()


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.large_base_example])
@given(st.binary(min_size=BLOB, max_size=BLOB))
def test_rings_decoded_from_bytes_are_to_the_queue_what_they_are_to_its_twin(
    judge: Judge, data: bytes
) -> None:
    assert judge.judge(data) > 0


def test_bytes_decode_to_the_same_rings_each_time() -> None:
    found = []
    for _ in range(2):
        with make_memory(RANGES) as memory:
            driver = HostileDriver(memory)
            driver.feed(bytes(range(256)) * 20)
            found.append((driver.run(1 << 20), driver.chains, driver.faults))
            driver.close()
    assert found[0] == found[1]
    assert found[0][0] > 10

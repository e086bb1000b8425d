"""Hostile rings by the million: ``fuzz/rings.py [--cases N] [--racing N] [--derived N] [--seed N]``.

Invariant: whatever the rings hold, the compiled queue yields only buffers that are guest memory, no more at
once than there are descriptors, and stops at the first broken rule; it touches no byte beside guest memory
(the pages around it end the process), and it always comes to an end.

``--cases`` rings come from a seeded generator and are driven in compiled code: taken, completed, published,
rewritten under way. Those of ``--racing`` another thread rewrites all the time. Those of ``--derived`` are
decoded from bytes that hypothesis makes, and each of their chains and faults is compared with a slow twin.
"""

import argparse
import random
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from pileus.testing import make_memory  # noqa: E402
from pileus.testing._hostile import RANGES, HostileDriver  # noqa: E402
from tests.unit.virtio.queue.derived import BLOB, Judge  # noqa: E402

MILLION = 1_000_000
BATCH = 200  # examples of hypothesis between two looks at the count


def main() -> None:
    parser = argparse.ArgumentParser(description="hostile rings by the million")
    parser.add_argument("--cases", type=int, default=MILLION, help="rings of the seeded generator")
    parser.add_argument("--derived", type=int, default=MILLION, help="rings decoded from hypothesis's bytes")
    parser.add_argument("--racing", type=int, default=MILLION, help="rings that change while they are read")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    if options.cases:
        generated(options.cases, options.seed)
    if options.racing:
        racing(options.racing, options.seed)
    if options.derived:
        derived(options.derived, options.seed)


def generated(count: int, number: int) -> None:
    began = time.monotonic()
    done: dict[str, int] = {}
    chains = 0
    for tracked in (False, True):
        with make_memory(RANGES, guarded=True) as memory:
            if tracked:
                memory.start_tracking()
            driver = HostileDriver(memory, number + tracked)
            driver.run(count // 2)
            chains += driver.chains
            for fault, times in driver.faults.items():
                done[fault] = done.get(fault, 0) + times
            driver.close()
    tell("generated", count // 2 * 2, time.monotonic() - began, done)
    print(f"  {chains} chains were taken, each buffer of them touched")


def racing(count: int, number: int) -> None:
    began = time.monotonic()
    with make_memory(RANGES, guarded=True) as memory:
        driver, other = HostileDriver(memory, number), HostileDriver(memory, number + 1)
        done = threading.Event()

        def scribble() -> None:
            while not done.is_set():
                other.scribble(10_000)

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            driver.run(count)
        finally:
            done.set()
            thread.join()
        tell("changed by another thread meanwhile", count, time.monotonic() - began, driver.faults)
        driver.close()
        other.close()


def derived(count: int, number: int) -> None:
    began = time.monotonic()
    judge = Judge()
    rings = blobs = 0

    @settings(max_examples=BATCH, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=BLOB, max_size=BLOB))
    def compare(data: bytes) -> None:
        nonlocal rings, blobs
        if rings < count:
            rings += judge.judge(data)
            blobs += 1

    while rings < count:
        seed(number)(compare)()
        number += 1
    judge.close()
    tell("derived by hypothesis and compared with the twin", rings, time.monotonic() - began, judge.faults)
    print(f"  from {blobs} strings of {BLOB} bytes")


def tell(what: str, count: int, seconds: float, faults: dict[str, int]) -> None:
    print(f"{count} rings {what} in {seconds:.1f} s, {count / seconds:.0f} a second", end="; ")
    print(f"all so far took {time.process_time():.1f} s of processor time")
    for fault, times in sorted(faults.items(), key=lambda each: -each[1]):
        print(f"  {times:8} {fault}")


if __name__ == "__main__":
    main()

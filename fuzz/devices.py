"""Hostile drivers against every device: ``fuzz/devices.py [--cases N] [--seed N] [--only NAME]…``.

Invariant: whatever a driver writes into its rings, into the registers and into the configuration, in whatever
order, the device either serves it or asks for a reset; it raises nothing, it comes to an end, it starts anew
after a reset, and it touches no byte beside guest memory (the pages around that end the process).

A case is one device and one driver, which does some dozens of things from the list ``ACTIONS``, most of them
wrong. The devices are those of ``tests/unit/virtio/factories.py``. A case is made of seed, name and number
alone, so that ``--seed S --only NAME --first N --cases 1`` repeats it.
"""

import argparse
import faulthandler
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from pileus.memory import GuestMemory  # noqa: E402
from pileus.memory._iommu import Endpoint  # noqa: E402
from pileus.testing import F_INDIRECT, F_NEXT, F_WRITE, FakeDriver, make_memory  # noqa: E402
from pileus.virtio import status  # noqa: E402
from tests.unit.virtio.factories import FACTORIES, Factory  # noqa: E402

MIB = 1 << 20
RANGES = [(0, MIB), (MIB, 64 << 10), (2 * MIB, 64 << 10), (1 << 32, 64 << 10)]
EDGES = [0, MIB, MIB + (64 << 10), 2 * MIB, 2 * MIB + (64 << 10), 1 << 32, (1 << 32) + (64 << 10), 1 << 64]
STEPS = 60
RING = 32  # entries: few, so that what is written is met
SLOW = 5.0  # seconds that no case may take
STUCK = 60  # seconds after which the process ends with a traceback
READY = status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK | status.DRIVER_OK


class Case:
    """One driver at its work."""

    def __init__(self, driver: FakeDriver, choose: random.Random) -> None:
        self.driver = driver
        self.device = driver.device
        self.choose = choose

    def run(self) -> None:
        for _ in range(STEPS):
            self.choose.choices(list(ACTIONS), list(ACTIONS.values()))[0](self)
            assert self.driver.status & ~(READY | status.NEEDS_RESET | status.FAILED) == 0
        if self.driver.scrambled is not None and isinstance(self.device.iommu, Endpoint):
            self.driver.scrambled.map(self.device.iommu)
        self.driver.start()
        assert self.driver.status == READY, "it does not recover"

    # -- numbers ----------------------------------------------------------------------------------

    def queue(self) -> int:
        return self.choose.randrange(len(self.device.queues))

    def gpa(self) -> int:
        if self.choose.random() < 0.8:
            return self.choose.randrange(MIB)
        return (self.choose.choice(EDGES) + self.choose.randrange(-64, 64)) % (1 << 64)

    def length(self) -> int:
        kind = self.choose.random()
        if kind < 0.6:
            return self.choose.choice([0, 1, 4, 8, 12, 16, 24, 512, 1526, 4096])
        return self.choose.randrange(1 << 17) if kind < 0.95 else self.choose.randrange(1 << 32)

    def data(self) -> bytes:
        """Small numbers, mostly: that is what requests are made of."""
        size = self.choose.choice([1, 4, 12, 16, 16, 17, 64, 300])
        if self.choose.random() < 0.5:
            return self.choose.randbytes(size)
        words = (self.choose.choice([0, 0, 1, 2, 3, 4, 8, 11, 13, 255]) for _ in range(-(-size // 4)))
        return b"".join(word.to_bytes(4, "little") for word in words)[:size]

    # -- actions ----------------------------------------------------------------------------------

    def ask(self) -> None:
        """A well-formed chain, with anything in it."""
        choose = self.choose
        readable = [self.data() for _ in range(choose.randrange(3))]
        writable = [choose.choice([1, 12, 16, 512, 4096]) for _ in range(choose.randrange(3))]
        if readable or writable:
            try:
                self.driver.add(readable, writable, self.queue(), choose.random() < 0.3)
            except (MemoryError, AssertionError):
                pass  # no room, or no indirect descriptors

    def describe(self) -> None:
        flags = self.choose.choice([0, F_NEXT, F_NEXT, F_WRITE, F_WRITE | F_NEXT, F_INDIRECT, 7, 0xFFFF])
        length = 16 * self.choose.randrange(8) if flags == F_INDIRECT else self.length()
        following = self.choose.choice([self.choose.randrange(RING + 2), 0xFFFF])
        self.driver.write_descriptor(
            self.choose.randrange(RING), self.gpa(), length, flags, following, self.queue()
        )

    def offer(self) -> None:
        self.driver.offer(self.choose.choice([self.choose.randrange(RING), RING, 0xFFFF]), self.queue())

    def offer_some(self) -> None:
        """Only heads that exist: what is wrong with their chains is then met."""
        queue = self.queue()
        for _ in range(self.choose.randrange(RING)):
            self.driver.offer(self.choose.randrange(RING), queue)

    def jump(self) -> None:
        self.driver.rings[self.queue()].set_available(self.choose.randrange(1 << 16))

    def scribble(self) -> None:
        """Anything over the rings themselves, or anywhere."""
        ring = self.driver.rings[self.queue()]
        base = self.choose.choice([ring.descriptors, ring.available, ring.used_ring, 0x1000])
        ring.memory.write(base + self.choose.randrange(512), self.data())

    def kick(self) -> None:
        index = self.queue()
        os.eventfd_write(self.device.queues[index].kick_fd, 1)
        self.driver.serve()

    def kick_all(self) -> None:
        for queue in self.device.queues:
            os.eventfd_write(queue.kick_fd, 1)
        self.driver.serve()

    def write_config(self) -> None:
        offset = self.choose.choice([0, 4, 8, 16, 20, 32, self.choose.randrange(1 << 12)])
        self.driver.write_config(offset, self.choose.randbytes(self.choose.choice([1, 2, 4, 8])))

    def unmap(self) -> None:
        """Take a page away from a device behind an IOMMU, or many, or map all again."""
        endpoint, scrambled = self.device.iommu, self.driver.scrambled
        if scrambled is None or not isinstance(endpoint, Endpoint):
            return
        kind = self.choose.random()
        if kind < 0.3:
            scrambled.map(endpoint)
        elif endpoint.domain is not None:
            scrambled.unmap(endpoint, self.choose.randrange(MIB), 1 if kind < 0.9 else MIB)

    def request(self) -> None:
        """Something for an IOMMU, on whatever queue: all numbers small, so that they meet."""
        choose = self.choose
        first = choose.choice([0, 4096, 8192, 0xFEE00000, (1 << 48) - 4096, (1 << 64) - 4096])
        last = (first + choose.choice([4095, 8191, 0, 1, (1 << 30) - 1])) & (1 << 64) - 1
        numbers = struct.pack("<II", choose.randrange(3), choose.choice([8, 16, 24]))
        fields = {
            1: numbers + struct.pack("<II", choose.randrange(3), choose.random() < 0.05),
            2: numbers + bytes(8),
            3: struct.pack("<IQQQI", choose.randrange(3), first, last, first, choose.randrange(5)),
            4: struct.pack("<IQQ4x", choose.randrange(3), first, last),
            5: numbers[4:] + bytes(64),
        }
        kind = choose.choice(list(fields))
        head = bytes([kind]) + choose.randbytes(3)
        cut = choose.choice([None, None, None, choose.randrange(80)])
        try:
            self.driver.add(
                [(head + fields[kind])[:cut] or b"\0"], [choose.choice([4, 68, 1, 200])], self.queue()
            )
        except MemoryError:
            pass

    def read_config(self) -> None:
        size = self.choose.choice([1, 2, 4, 8])
        assert len(self.driver.read_config(self.choose.randrange(300), size)) == size

    def write_status(self) -> None:
        self.driver.control.set_status(self.choose.randrange(256))

    def write_registers(self) -> None:
        control, choose = self.driver.control, self.choose
        control.queue_select = choose.choice([self.queue(), choose.randrange(1 << 16)])
        control.set_queue_size(choose.choice([RING, choose.randrange(1 << 16)]))
        control.set_queue_address(
            choose.choice(["descriptors", "available", "used"]),
            choose.random() < 0.5,
            self.gpa() & 0xFFFFFFFF,
        )
        control.enable_queue()
        control.driver_features_select = choose.randrange(3)
        control.driver_features = choose.randrange(1 << 32)

    def restart(self) -> None:
        self.driver.start()

    def restart_with_other_features(self) -> None:
        """Some of those that are offered; a device may find that they do not go together."""
        driver = self.driver
        driver.negotiate()
        driver.reset()
        driver.control.set_status(status.ACKNOWLEDGE | status.DRIVER)
        driver.write_features(driver.offered & self.choose.randrange(1 << 64) | 1 << 32)
        driver.control.set_status(driver.status | status.FEATURES_OK)
        driver.set_up_queues()
        driver.control.set_status(driver.status | status.DRIVER_OK)
        driver.serve()

    def host(self) -> None:
        """What the host does to a device meanwhile."""
        choose, device = self.choose, self.device
        for (kind, name), make in HOST.items():
            if type(device).__name__ == kind:
                getattr(device, name)(*make(choose))
        self.driver.serve()

    def save(self) -> None:
        if type(self.device).__name__ != "Net":  # it does not pause yet
            self.device.pause()
            self.driver.control.state()
            if self.device.memory is not None:
                self.device.resume()


ACTIONS: dict[Callable[[Case], None], int] = {  # and how often
    Case.ask: 10,
    Case.describe: 10,
    Case.offer: 2,
    Case.offer_some: 6,
    Case.jump: 1,
    Case.scribble: 4,
    Case.kick: 8,
    Case.kick_all: 8,
    Case.write_config: 2,
    Case.read_config: 1,
    Case.write_status: 1,
    Case.write_registers: 1,
    Case.restart: 6,
    Case.restart_with_other_features: 2,
    Case.host: 3,
    Case.unmap: 3,
    Case.request: 4,
    Case.save: 1,
}
HOST: dict[tuple[str, str], Callable[[random.Random], tuple[object, ...]]] = {  # method -> its arguments
    ("ConsoleDevice", "feed"): lambda choose: (choose.randbytes(choose.randrange(6000)),),
    ("ConsoleDevice", "output_ready"): lambda choose: (),
    ("ConsoleDevice", "resize"): lambda choose: (choose.randrange(1 << 17), choose.randrange(1 << 17)),
    ("Balloon", "resize"): lambda choose: (choose.randrange(1 << 40),),
    ("Balloon", "request_statistics"): lambda choose: (),
}


def run(name: str, factory: Factory, number: int, seed: int, memory: GuestMemory) -> bool:
    """One case; whether the device asked for a reset at some time. Raises whatever the device raises."""
    choose = random.Random(f"{seed} {name} {number}")
    for gpa, size in RANGES:
        memory.write(gpa, bytes(size))
    with factory() as device:
        sizes = [min(RING, size) for size in device.queue_sizes]
        failed = False
        fail = device.fail

        def note(reason: str) -> None:
            nonlocal failed
            failed = True
            fail(reason)

        device.fail = note  # type: ignore[method-assign]
        event_idx = choose.random() < 0.5
        with FakeDriver(device, memory=memory, queue_sizes=sizes, event_idx=event_idx) as driver:
            Case(driver, choose).run()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="hostile drivers against every device")
    parser.add_argument("--cases", type=int, default=2000, help="for each device")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", action="append", choices=list(FACTORIES), help="a device; may be repeated")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with make_memory(RANGES, guarded=True) as memory:
        for name in options.only or FACTORIES:
            began, failed = time.monotonic(), 0
            for number in range(options.first, options.first + options.cases):
                faulthandler.dump_traceback_later(STUCK, exit=True)
                case_began = time.monotonic()
                try:
                    failed += run(name, FACTORIES[name], number, options.seed, memory)
                except BaseException:
                    print(f"{name}: --seed {options.seed} --only {name!r} --first {number} --cases 1")
                    raise
                assert time.monotonic() - case_began < SLOW, f"{name}: case {number} was slow"
            seconds = time.monotonic() - began
            print(
                f"{name}: {options.cases} cases in {seconds:.1f} s,"
                f" {failed} of them with a device that needed a reset",
                flush=True,
            )
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()

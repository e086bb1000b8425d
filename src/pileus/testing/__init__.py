"""What a device is tested with, ours and yours: a driver in memory, without a guest and without KVM."""

from pileus.testing.driver import FakeDriver
from pileus.testing.memory import Heap, Scrambled, make_memory
from pileus.testing.ring import F_INDIRECT, F_NEXT, F_WRITE, Ring, Used

__all__ = [
    "F_INDIRECT",
    "F_NEXT",
    "F_WRITE",
    "FakeDriver",
    "Heap",
    "Ring",
    "Scrambled",
    "Used",
    "make_memory",
]

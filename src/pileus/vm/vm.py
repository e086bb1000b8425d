"""One VM: what the builder made, its threads, and its end."""

import _thread

from pileus.cleanup import Cleanup
from pileus.vm.vcpu import STACK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from pileus.bus import Bus
    from pileus.memory import GuestMemory
    from pileus.vm.vcpu import VcpuThread

    class Timer(Protocol):
        def cancel(self) -> None: ...

    class Loop(Protocol):
        """What a VM needs of the control loop."""

        def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None: ...
        def unwatch(self, fd: int) -> None: ...
        def after(self, seconds: float, call: Callable[[], None]) -> Timer: ...
        def post(self, call: Callable[[], None]) -> None: ...


EXIT_NAMES = {2: "port I/O", 6: "MMIO", 10: "signals"}  # <linux/kvm.h>, KVM_EXIT_*


class Vm:
    """A built machine. ``start`` once, ``close`` once; a reboot is another Vm from the same configuration."""

    def __init__(
        self,
        memory: "GuestMemory",
        threads: "list[VcpuThread]",
        buses: "tuple[Bus, ...]",
        cleanup: Cleanup,
    ) -> None:
        self.memory = memory
        self._buses = buses
        self.threads = threads
        self._cleanup = cleanup
        self._started: list[VcpuThread] = []

    def start(self) -> None:
        """Let the vCPUs run, each on a thread of its own."""
        before = _thread.stack_size(STACK_SIZE)  # of all threads to come, also those of who embeds us
        try:
            for thread in self.threads:
                thread.start()
                self._started.append(thread)
        finally:
            _thread.stack_size(before)

    def stop(self) -> None:
        """Take the vCPUs out of the guest and end their threads."""
        for thread in self._started:
            thread.ask_to_stop()
        for thread in self._started:
            thread.join()
        self._started.clear()

    def close(self) -> None:
        """Stop, and give back memory, descriptors and devices."""
        self.stop()
        self._cleanup.close()

    @property
    def exits(self) -> dict[int, int]:
        """How often the guest left to this process, by KVM_EXIT_* number, all vCPUs together."""
        total: dict[int, int] = {}
        for thread in self.threads:
            for reason, count in thread.vcpu.exits.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def usage(self) -> "Iterator[str]":
        """What the guest's exits were for, a line each: what a user tunes."""
        for reason, count in sorted(self.exits.items()):
            yield f"{EXIT_NAMES.get(reason, f'KVM_EXIT {reason}')}: {count} exits"
        for bus in self._buses:
            for base, device, accesses, nanoseconds in bus.usage:
                name = getattr(device, "name", type(device).__name__)
                yield f"{bus.name} {base:#x}, {name}: {accesses} accesses, {nanoseconds / 1e6:.1f} ms in it"

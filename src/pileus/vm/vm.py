"""One VM: what the builder made, its threads, and its end."""

import _thread
import errno

from pileus.cleanup import Cleanup
from pileus.devices.ged import POWER_BUTTON, Ged
from pileus.errors import KvmError
from pileus.vm.vcpu import STACK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from pileus.bus import Bus
    from pileus.memory import GuestMemory
    from pileus.virtio.device import VirtioDevice
    from pileus.vm.coredump import CoreDump
    from pileus.vm.vcpu import VcpuThread

    class Timer(Protocol):
        def cancel(self) -> None: ...

    class Loop(Protocol):
        """What a VM needs of the control loop."""

        def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None: ...
        def unwatch(self, fd: int) -> None: ...
        def after(self, seconds: float, call: Callable[[], None]) -> Timer: ...
        def post(self, call: Callable[[], None]) -> None: ...


PLAIN = str.maketrans(" /", "__")
EXIT_NAMES = {2: "port I/O", 6: "MMIO", 10: "signals"}  # <linux/kvm.h>, KVM_EXIT_*


class Vm:
    """A built machine. ``start`` once, ``close`` once; a reboot is another Vm from the same configuration."""

    def __init__(
        self,
        memory: "GuestMemory",
        threads: "list[VcpuThread]",
        buses: "tuple[Bus, ...]",
        cleanup: Cleanup,
        devices: "list[VirtioDevice]",
        ged: Ged | None = None,
    ) -> None:
        self._ged = ged
        self.memory = memory
        self.devices = devices
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

    def pause(self) -> None:
        """Take the vCPUs out of the guest, then keep the devices from its memory; both is done on return."""
        self._park()
        for device in self.devices:
            device.pause()

    def resume(self) -> None:
        """Let devices and vCPUs go on.

        Nobody stopped the guest's clocks: time has gone by for it as for the host, so that its date is right.
        But its watchdogs are told that it was not its fault.
        """
        for device in self.devices:
            device.resume()
        for thread in self._started:
            try:
                thread.vcpu.note_pause()
            except KvmError as error:
                if error.errno != errno.EINVAL:  # a guest that does not use kvmclock
                    raise
        self._unpark()

    def press_power_button(self) -> None:
        """Ask the guest, politely, to shut down; what it does is its own affair."""
        assert self._ged is not None, "the VM was built without events"
        self._ged.notify(POWER_BUTTON)

    def send_nmi(self) -> None:
        """An NMI to each vCPU, as the button of that name on a server: a guest may dump itself for it."""
        self._park()  # KVM takes it between two KVM_RUN only
        try:
            for thread in self._started:
                thread.vcpu.inject_nmi()
        finally:
            self._unpark()

    def coredump(self, path: str) -> "CoreDump":
        """A core of the paused VM, to be written to the new file ``path``. Raises ConfigError."""
        from pileus.vm.core_notes import registers
        from pileus.vm.coredump import CoreDump

        return CoreDump(path, self.memory, [registers(thread.vcpu) for thread in self.threads])

    def _park(self) -> None:
        for thread in self._started:
            thread.ask_to_park()
        for thread in self._started:
            thread.wait_until_parked()

    def _unpark(self) -> None:
        for thread in self._started:
            thread.unpark()

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

    def counters(self) -> "dict[str, dict[str, int]]":
        """What devices count, by their names, and the exits of the vCPUs."""
        found: dict[str, dict[str, int]] = {}
        for device in self.devices:
            if own := device.counters():
                found[device.name] = own
        exits = ((EXIT_NAMES.get(reason, f"exit {reason}"), count) for reason, count in self.exits.items())
        found["vcpus"] = {name.lower().translate(PLAIN): count for name, count in exits}
        return found

    def usage(self) -> "Iterator[str]":
        """What the guest's exits were for, a line each: what a user tunes."""
        for reason, count in sorted(self.exits.items()):
            yield f"{EXIT_NAMES.get(reason, f'KVM_EXIT {reason}')}: {count} exits"
        for bus in self._buses:
            for base, device, accesses, nanoseconds in bus.usage:
                name = getattr(device, "name", type(device).__name__)
                yield f"{bus.name} {base:#x}, {name}: {accesses} accesses, {nanoseconds / 1e6:.1f} ms in it"

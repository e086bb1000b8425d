"""What a PCI function that passes a device through needs of who has it: the kernel, or another process."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pileus.memory import Region
    from pileus.pci.msix import Routes as Messages
    from pileus.vfio.abi import RegionInfo

    class Backend(Protocol):
        """A device. Whatever it may do, none of these raises but where it is said.

        Any thread may call.
        """

        name: str
        regions: list[RegionInfo]  # by index; those that it lacks have no size
        irqs: dict[int, int]  # kind -> how many

        def read(self, region: int, offset: int, size: int) -> int:
            """A driver's read; ones where the device fails."""

        def write(self, region: int, offset: int, size: int, value: int) -> None: ...

        def map(self, region: int, offset: int, size: int) -> Region | None:
            """Memory that is this part of a region, the caller's to close; None where that cannot be."""

        def set_eventfds(self, kind: int, fds: list[int]) -> None:
            """Write these for the interrupts of a kind, from number 0 on; none turns the kind off."""

        def unmask_by(self, fd: int) -> bool:
            """Whether a write to ``fd`` now unmasks INTx; otherwise ``unmask`` is to be called."""

        def unmask(self) -> None: ...

        def reset(self) -> None: ...

        def close(self) -> None: ...

    class Pins(Protocol):
        """Pins of the interrupt controller: KVM's irqfds. Raise KvmError."""

        def add_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None: ...
        def remove_irqfd(self, fd: int, gsi: int) -> None: ...

    class Watcher(Protocol):
        """The control loop."""

        def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None: ...
        def unwatch(self, fd: int) -> None: ...

    class Slots(Protocol):
        """See kvm.slots. ``insert`` raises KvmError."""

        def insert(self, gpa: int, memory: Region, flags: int = 0) -> int: ...
        def remove(self, slot: int) -> None: ...

    __all__ = ["Backend", "Messages", "Pins", "Slots", "Watcher"]

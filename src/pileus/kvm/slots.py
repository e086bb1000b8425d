"""Memory slots: host memory that the guest sees besides its RAM."""

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Memory(Protocol):
        """A mapping of this process, such as a memory.Region."""

        size: int

        @property
        def hva(self) -> int: ...

    class Vm(Protocol):
        def set_memory(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None: ...


class Slots:
    """Gives out the slots of ``vm`` from ``first`` on. Any thread may call."""

    def __init__(self, vm: "Vm", first: int) -> None:
        self._vm = vm
        self._next = first
        self._freed: list[int] = []
        self._lock = _thread.allocate_lock()

    def insert(self, gpa: int, memory: "Memory", flags: int = 0) -> int:
        """Let the guest see all of ``memory`` at ``gpa``; returns the slot. Raises KvmError."""
        with self._lock:
            slot = self._freed.pop() if self._freed else self._next
            try:
                self._vm.set_memory(slot, gpa, memory.size, memory.hva, flags)
            except BaseException:
                if slot != self._next:
                    self._freed.append(slot)
                raise
            self._next = max(self._next, slot + 1)
            return slot

    def remove(self, slot: int) -> None:
        """The guest sees it no more, and nothing of KVM holds the memory."""
        with self._lock:
            self._vm.set_memory(slot, 0, 0, 0)
            self._freed.append(slot)

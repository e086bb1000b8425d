"""GSI routes: which message, or which pin of the in-kernel controllers, a GSI stands for.

KVM takes the whole table at a time and waits for all vCPUs to forget the old one, so the table is handed
over only when a message changed. Source: Documentation/virt/kvm/api.rst, 4.52 (KVM_SET_GSI_ROUTING).
"""

import _thread

from pileus import log
from pileus.errors import ConfigError, KvmError
from pileus.kvm._vm import IOAPIC, PIC_MASTER, PIC_SLAVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.kvm._vm import Vm

IOAPIC_PINS, PIC_PINS = 24, 16
MSI_BASE, MSI_BASE_MASK = 0xFEE00000, 0xFF_FFF00000  # bits 40 to 63 are for APIC ids above 255

PINS = [  # what KVM_CREATE_IRQCHIP sets up: ISA interrupts go to both controllers
    *((gsi, PIC_SLAVE if gsi & 8 else PIC_MASTER, gsi & 7) for gsi in range(PIC_PINS)),
    *((gsi, IOAPIC, gsi) for gsi in range(IOAPIC_PINS)),
]
MAX_MESSAGES = 4096 - len(PINS)  # KVM_MAX_IRQ_ROUTES


class Routes:
    """GSIs from ``first`` on for message-signalled interrupts, in a VM with all controllers in the kernel.

    Any thread may call.
    """

    def __init__(self, vm: "Vm", first: int = IOAPIC_PINS) -> None:
        self._vm = vm
        self._next = first
        self._end = first + MAX_MESSAGES
        self._freed: list[int] = []
        self._messages: dict[int, tuple[int, int]] = {}  # as KVM has them
        self._stale = False  # KVM has messages of freed GSIs besides
        self._lock = _thread.allocate_lock()

    def allocate(self) -> int:
        """A GSI that nobody has. Raises ConfigError when all are given out."""
        with self._lock:
            if self._freed:
                return self._freed.pop()
            if self._next == self._end:
                raise ConfigError("devices", "have too many queues", f"KVM routes {MAX_MESSAGES} interrupts")
            self._next += 1
            return self._next - 1

    def free(self, gsi: int) -> None:
        """Give ``gsi`` back, to which nothing is attached any more. KVM hears of it with the next change."""
        with self._lock:
            self._stale = self._messages.pop(gsi, None) is not None or self._stale
            self._freed.append(gsi)

    def set(self, gsi: int, address: int, data: int) -> None:
        """Route ``gsi`` to a message; to nowhere, where the guest chose an address that is no interrupt's."""
        with self._lock:
            message = (address, data)
            if self._messages.get(gsi) == message:
                return
            old = self._messages.pop(gsi, None)
            if address & MSI_BASE_MASK == MSI_BASE:
                self._messages[gsi] = message
            elif old is None and not self._stale:
                return
            self._hand_over(gsi)

    def attach(self, fd: int, gsi: int) -> None:
        """A write to eventfd ``fd`` raises ``gsi``; at once, if it was written before."""
        self._vm.add_irqfd(fd, gsi)

    def detach(self, fd: int, gsi: int) -> None:
        """What is written to ``fd`` from now on stays there."""
        self._vm.remove_irqfd(fd, gsi)

    def _hand_over(self, gsi: int) -> None:
        self._stale = False
        try:
            self._vm.set_routing(PINS, self._table())
        except KvmError as error:
            log.limited(log.WARNING, f"GSI {gsi} leads nowhere: {error}")
            self._messages.pop(gsi, None)
            self._vm.set_routing(PINS, self._table())

    def _table(self) -> list[tuple[int, int, int]]:
        return [(gsi, address, data) for gsi, (address, data) in self._messages.items()]

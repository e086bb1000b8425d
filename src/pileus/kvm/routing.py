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
    from collections.abc import Mapping, Sequence

    from pileus.kvm._vm import Vm

IOAPIC_PINS, PIC_PINS = 24, 16
NO_SUCH_APIC = 1  # errno: KVM_SIGNAL_MSI returns -1 where no APIC has the destination
MSI_BASE, MSI_BASE_MASK = 0xFEE00000, 0xFF_FFF00000  # bits 40 to 63 are for APIC ids above 255

PINS = [  # what KVM_CREATE_IRQCHIP sets up: ISA interrupts go to both controllers
    *((gsi, PIC_SLAVE if gsi & 8 else PIC_MASTER, gsi & 7) for gsi in range(PIC_PINS)),
    *((gsi, IOAPIC, gsi) for gsi in range(IOAPIC_PINS)),
]
MAX_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES


def routable(address: int) -> int | None:
    """A message's address as KVM takes it, or None where it is not one of an interrupt.

    Bits 11 to 5 extend an APIC id to 15 bits, where CPUID offers it to the guest (MSI_EXT_DEST_ID). KVM wants
    all bits from the eighth on in the address's upper half, and looks there only if told of such ids.
    """
    if address & MSI_BASE_MASK != MSI_BASE:
        return None
    return address | (address >> 5 & 0x7F) << 40


class Routes:
    """GSIs from ``first`` on for message-signalled interrupts.

    ``pins`` are the routes of the controllers in the kernel. Where there is no IOAPIC among them, its pins'
    GSIs have messages too. Any thread may call.
    """

    def __init__(
        self, vm: "Vm", first: int = IOAPIC_PINS, pins: "Sequence[tuple[int, int, int]]" = PINS
    ) -> None:
        self._vm = vm
        self._pins = pins
        self._next = first
        self._most = MAX_ROUTES - (len(pins) or first)
        self._end = first + self._most
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
                raise ConfigError("devices", "have too many queues", f"KVM routes {self._most} interrupts")
            self._next += 1
            return self._next - 1

    def free(self, gsi: int) -> None:
        """Give ``gsi`` back, to which nothing is attached any more. KVM hears of it with the next change."""
        with self._lock:
            self._stale = self._messages.pop(gsi, None) is not None or self._stale
            self._freed.append(gsi)

    def set(self, gsi: int, address: int, data: int) -> None:
        """Route ``gsi`` to a message; to nowhere, where the guest chose an address that is no interrupt's."""
        self.set_all({gsi: (address, data)})

    def set_all(self, messages: "Mapping[int, tuple[int, int] | None]") -> None:
        """Likewise for many GSIs, of which KVM hears at once; None leads nowhere."""
        with self._lock:
            changed = [gsi for gsi, message in messages.items() if self._change(gsi, message)]
            if changed:
                self._hand_over(changed)

    def signal(self, address: int, data: int) -> bool:
        """Deliver a message now, without a GSI; return whether a local APIC took it."""
        target = routable(address)
        if target is None:
            return False
        try:
            return self._vm.signal_msi(target, data) > 0
        except KvmError as error:
            if error.errno != NO_SUCH_APIC:
                log.limited(log.WARNING, f"an interrupt is lost: {error}")
            return False

    def attach(self, fd: int, gsi: int) -> None:
        """A write to eventfd ``fd`` raises ``gsi``; at once, if it was written before."""
        self._vm.add_irqfd(fd, gsi)

    def detach(self, fd: int, gsi: int) -> None:
        """What is written to ``fd`` from now on stays there."""
        self._vm.remove_irqfd(fd, gsi)

    def _change(self, gsi: int, message: tuple[int, int] | None) -> bool:
        """Note the message; return whether KVM has another one."""
        target = None if message is None else routable(message[0])
        wanted = None if message is None or target is None else (target, message[1])
        if self._messages.get(gsi) == wanted and (wanted is not None or not self._stale):
            return False
        if wanted is None:
            self._messages.pop(gsi, None)
        else:
            self._messages[gsi] = wanted
        return True

    def _hand_over(self, changed: list[int]) -> None:
        self._stale = False
        try:
            self._vm.set_routing(self._pins, self._table())
        except KvmError as error:
            for gsi in changed:
                log.limited(log.WARNING, f"GSI {gsi} leads nowhere: {error}")
                self._messages.pop(gsi, None)
            self._vm.set_routing(self._pins, self._table())

    def _table(self) -> list[tuple[int, int, int]]:
        return [(gsi, address, data) for gsi, (address, data) in self._messages.items()]

"""A PCI function of the guest whose device is elsewhere."""

from pileus import log
from pileus.bus import PythonDevice
from pileus.errors import ConfigError, KvmError
from pileus.memory import Region
from pileus.pci import capability
from pileus.pci.bar import FLAGS, MIN_ROM_SIZE, MIN_SIZE, PREFETCHABLE, TYPE_64BIT, Bar, RomBar
from pileus.pci.config_space import BAR_COUNT
from pileus.pci.function import Function
from pileus.vfio import abi
from pileus.vfio.config import PassThroughConfig
from pileus.vfio.interrupts import Interrupts, Pin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.bus import Device
    from pileus.vfio.backend import Backend, Messages, Pins, Slots, Watcher

IO, TYPE = 1, 3 << 1  # of a BAR's register
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D
PAGE = 4096
TABLE_BAR, TABLE_OFFSET = 0x7, ~0x7


class Trapped(PythonDevice):
    """Accesses that nobody serves but the device."""

    def __init__(self, backend: "Backend", region: int, base: int) -> None:
        self.name = f"{backend.name} region {region}"
        self._backend = backend
        self._region = region
        self._base = base

    def read(self, offset: int, size: int) -> int:
        return self._backend.read(self._region, self._base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._backend.write(self._region, self._base + offset, size, value)


class Window:
    """The parts of a BAR that are memory of the host, and the slots that they fill while it is placed."""

    def __init__(self, name: str, slots: "Slots", parts: list[tuple[int, Region]]) -> None:
        self._name = name
        self._slots = slots
        self._parts = parts
        self._filled: list[int] = []

    def moved(self, gpa: int | None) -> None:
        """What cannot be mapped there is trapped."""
        while self._filled:
            self._slots.remove(self._filled.pop())
        for offset, region in self._parts if gpa is not None and not gpa % PAGE else ():
            assert gpa is not None
            try:
                self._filled.append(self._slots.insert(gpa + offset, region))
            except KvmError as error:
                log.limited(log.WARNING, f"{self._name}: accesses are slow: {error}")

    def close(self) -> None:
        self.moved(None)
        for _, region in self._parts:
            region.close()
        self._parts.clear()


class PassThrough(Function):
    """Add it to a PciBus, then tell ``placed`` how. Owns ``backend``, which was reset.

    Raises ConfigError where the device is none that a guest could have.
    """

    def __init__(
        self,
        backend: "Backend",
        routes: "Messages",
        pins: "Pins",
        slots: "Slots",
        watcher: "Watcher",
        gsi: int,
    ) -> None:
        self._backend = backend
        self._windows: list[Window] = []
        self._slots = slots
        self._decode: Callable[[], None] = lambda: None
        self.gsi: int | None = None
        self.interrupts: Interrupts | None = None
        try:
            self._config = PassThroughConfig(backend, self.reset)
            super().__init__(backend.name, self._config)
            pin = self._make_pin(pins, watcher, gsi)
            self.interrupts = Interrupts(backend, self._config, routes, pin)
            self._tables = self._find_tables()
            self._add_bars()
            self._add_rom()
            self.interrupts.update()
        except BaseException:
            self.close()
            raise

    def placed(self, decode: "Callable[[], None]") -> None:
        """``decode()`` looks at where the BARs want to be."""
        self._decode = decode

    def reset(self) -> None:
        """The driver resets the function: it is as it was before firmware came."""
        self._config.forget()
        self._decode()
        self._backend.reset()
        if self.interrupts is not None:
            self.interrupts.reset()

    def close(self) -> None:
        if self.interrupts is not None:
            self.interrupts.close()
        for window in self._windows:
            window.close()
        self._windows.clear()
        self._backend.close()

    def _make_pin(self, pins: "Pins", watcher: "Watcher", gsi: int) -> Pin | None:
        if not self._config.data[INTERRUPT_PIN] or not self._backend.irqs.get(abi.INTX):
            self._config.data[INTERRUPT_PIN] = 0
            return None
        self._config.data[INTERRUPT_PIN] = 1  # one function a slot, so it is INTA
        self._config.data[INTERRUPT_LINE] = gsi
        self.gsi = gsi
        return Pin(self._backend, pins, watcher, gsi)

    def _find_tables(self) -> "list[tuple[int, int, int, Device]]":
        """(BAR, offset, size, who answers) of what MSI-X keeps in BARs."""
        at, msix = self._config.found.get(capability.MSIX), None
        if self.interrupts is not None:
            msix = self.interrupts.msix
        if at is None or msix is None:
            return []
        table, pba = self._config.get(at + 4, 4), self._config.get(at + 8, 4)
        return [
            (table & TABLE_BAR, table & TABLE_OFFSET, msix.table_size, msix.table),
            (pba & TABLE_BAR, pba & TABLE_OFFSET, msix.pba_size, msix.pba),
        ]

    def _add_bars(self) -> None:
        index = 0
        while index < BAR_COUNT:
            region, flags = self._backend.regions[index], self._config.bar_flags[index]
            if region.size and flags & IO:
                log.info(f"{self.name}: BAR {index} is of ports, which a guest does not get")
            elif region.size:
                self._add_one(index, region, flags)
            index += 2 if region.size and not flags & IO and flags & TYPE == TYPE_64BIT else 1
        for bar, *_ in self._tables:
            if self.bar(bar) is None:
                raise ConfigError("device", self.name, f"its interrupts are in BAR {bar}, which it has not")

    def _add_one(self, index: int, region: abi.RegionInfo, flags: int) -> None:
        wide = flags & TYPE == TYPE_64BIT
        if region.size < MIN_SIZE or region.size & (region.size - 1) or (wide and index == BAR_COUNT - 1):
            raise ConfigError("device", self.name, f"its BAR {index} cannot be {region.size:#x} bytes")
        tables = [table[1:] for table in self._tables if table[0] == index]
        mapped = [
            (offset, self._backend.map(index, offset, size))
            for offset, size in _whole_pages(region.areas, tables)
        ]
        window = Window(self.name, self._slots, [(at, memory) for at, memory in mapped if memory is not None])
        self._windows.append(window)
        sections = self._sections(index, region.size, tables)
        prefetchable = bool(flags & FLAGS & PREFETCHABLE)
        self.add_bar(
            Bar(index, region.size, sections, wide=wide, prefetchable=prefetchable, moved=window.moved)
        )

    def _sections(
        self, index: int, size: int, tables: "list[tuple[int, int, Device]]"
    ) -> "list[tuple[int, int, Device]]":
        """All of the BAR, trapped, around ``tables``."""
        sections: list[tuple[int, int, Device]] = []
        at = 0
        for offset, length, device in sorted(tables, key=lambda table: table[0]):
            if offset < at or length > size or offset > size - length:
                raise ConfigError(
                    "device", self.name, f"its BAR {index} has no {length:#x} bytes at {offset:#x}"
                )
            if offset > at:
                sections.append((at, offset - at, Trapped(self._backend, index, at)))
            sections.append((offset, length, device))
            at = offset + length
        if at < size:
            sections.append((at, size - at, Trapped(self._backend, index, at)))
        return sections

    def _add_rom(self) -> None:
        size = self._backend.regions[abi.ROM].size
        if size >= MIN_ROM_SIZE and not size & (size - 1):
            self.add_bar(RomBar(size, [(0, size, Trapped(self._backend, abi.ROM, 0))]))


def _whole_pages(
    areas: list[tuple[int, int]], tables: "list[tuple[int, int, Device]]"
) -> list[tuple[int, int]]:
    """The (offset, size) of ``areas`` in whole pages that have no part of ``tables`` in them."""
    found = []
    for offset, size in areas:
        at, end = -(-offset // PAGE) * PAGE, (offset + size) // PAGE * PAGE
        for start, length, _ in sorted(tables, key=lambda table: table[0]):
            if start + length <= at or end <= start:
                continue
            first = start // PAGE * PAGE
            if first > at:
                found.append((at, first - at))
            at = max(at, -(-(start + length) // PAGE) * PAGE)
        if at < end:
            found.append((at, end - at))
    return found

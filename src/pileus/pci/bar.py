"""Base address registers: a range of memory that a function answers, wherever a driver puts it.

Source: PCI Local Bus 3.0, 6.2.5.1 (Address Maps). A register keeps the bits above its size and nothing
below, so that a driver that writes all ones reads the size; no state is needed for that.
"""

from pileus.bus import Bus
from pileus.pci.config_space import BAR_COUNT, BARS, COMMAND, MEMORY_ENABLE, ROM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pileus.bus import Device
    from pileus.pci.config_space import ConfigSpace

    Section = tuple[int, int, Device]  # offset in the BAR, size, who answers there

MIN_SIZE = 0x10
TYPE_64BIT, PREFETCHABLE = 2 << 1, 1 << 3
FLAGS = 0xF


MIN_ROM_SIZE, ROM_ENABLE = 0x800, 1


class Bar:
    """Registers ``index`` (and the next one, if ``wide``: 64 bits) for ``size`` bytes, a power of two.

    What no section covers reads as ones. ``moved(gpa)`` is called after the BAR came to be at ``gpa`` and,
    with None, before it leaves; never twice in a row with an address.
    """

    def __init__(
        self,
        index: int,
        size: int,
        sections: "Sequence[Section]",
        *,
        wide: bool = True,
        prefetchable: bool = False,
        moved: "Callable[[int | None], None] | None" = None,
    ) -> None:
        if size < MIN_SIZE or size & (size - 1) or not 0 <= index < BAR_COUNT - wide:
            raise ValueError(f"BAR {index} of {size:#x} bytes")
        self.index = index
        self.size = size
        self.sections = sections
        self.wide = wide
        self.moved = moved
        self.gpa: int | None = None  # where it answers now
        self._local = Bus(f"BAR {index}")
        for offset, length, device in sections:
            self._local.insert(offset, length, device)
        self._offset = BARS + 4 * index
        self._width = 8 if wide else 4
        self._flags = wide * TYPE_64BIT | prefetchable * PREFETCHABLE

    def define(self, config: "ConfigSpace") -> None:
        """Make the registers of it in ``config``; the address is 0, which is nowhere."""
        config.set(self._offset, self._width, self._flags)
        config.allow(self._offset, self._width, (1 << (8 * self._width)) - self.size)

    def assign(self, config: "ConfigSpace", gpa: int) -> None:
        """Write the address, as firmware would."""
        config.set(self._offset, self._width, gpa | self._flags)

    def wanted(self, config: "ConfigSpace") -> int | None:
        """Where the driver wants it: None while memory decoding is off."""
        if not config.get(COMMAND, 2) & MEMORY_ENABLE:
            return None
        return config.get(self._offset, self._width) & ~FLAGS

    def load(self, offset: int, size: int) -> int:
        """What a driver would read at ``offset``, wherever the BAR is; size 1, 2, 4 or 8."""
        return self._local.load(offset, size)

    def store(self, offset: int, size: int, value: int) -> None:
        """What a driver's write would do."""
        self._local.store(offset, size, value)


class RomBar(Bar):
    """The expansion ROM: a register of its own, with a bit that enables it besides the command register's.

    Source: PCI Local Bus 3.0, 6.2.5.2 (Expansion ROM Base Address Register).
    """

    def __init__(self, size: int, sections: "Sequence[Section]") -> None:
        if size < MIN_ROM_SIZE:
            raise ValueError(f"an expansion ROM of {size:#x} bytes")
        super().__init__(0, size, sections, wide=False)
        self.index = BAR_COUNT
        self._offset = ROM
        self._flags = 0

    def define(self, config: "ConfigSpace") -> None:
        super().define(config)
        config.allow(ROM, 4, (1 << 32) - self.size | ROM_ENABLE)

    def wanted(self, config: "ConfigSpace") -> int | None:
        if not config.get(ROM, 4) & ROM_ENABLE:
            return None
        gpa = super().wanted(config)
        return None if gpa is None else gpa & ~(MIN_ROM_SIZE - 1)

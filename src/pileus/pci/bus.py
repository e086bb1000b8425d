"""PCI bus 0: 32 slots of functions, and where in guest memory their BARs answer."""

import _thread

from pileus import log
from pileus.errors import ConfigError
from pileus.pci._config import ConfigTable
from pileus.pci.allocator import allocate
from pileus.pci.config_space import BAR_COUNT, BARS, COMMAND, ROM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.bus import Bus
    from pileus.pci.allocator import Window
    from pileus.pci.bar import Bar
    from pileus.pci.function import Function

SLOTS, FUNCTIONS = 32, 8
BARS_END = BARS + 4 * BAR_COUNT


class PciBus:
    """Functions by slot (only function 0 of each so far); their BARs appear on ``mmio``.

    A BAR answers where a driver put it if that is aligned, inside one of the windows (``below_4g`` first,
    then perhaps one above RAM) and not taken; elsewhere nothing happens, and nothing else is harmed. Any
    thread may call; writes are served one at a time.
    """

    def __init__(self, mmio: "Bus", below_4g: "Window", above_4g: "Window | None" = None) -> None:
        self.table = ConfigTable()
        self.functions: dict[int, Function] = {}  # by slot << 3 | function
        self._mmio = mmio
        self._below_4g = [below_4g]
        self._windows = [above_4g, below_4g] if above_4g is not None else [below_4g]
        self._placed: list[Bar] = []
        self._lock = _thread.RLock()  # a write to a function may access its BARs

    def add(self, function: "Function", slot: int | None = None) -> int:
        """Put ``function`` into ``slot`` (default: the first free one) and give its BARs addresses.

        Returns the slot. Raises ConfigError where there is no slot or address left.
        """
        if slot is None:
            slot = self.free_slot()
        if slot << 3 in self.functions or not 0 <= slot < SLOTS:
            raise ValueError(f"slot {slot} is not free")
        with self._lock:
            for bar in function.bars:
                bar.assign(function.config, allocate(self._windows if bar.wide else self._below_4g, bar.size))
            function.config.after_write(COMMAND, 2, lambda _offset, _size: self.decode(function))
            function.config.after_write(BARS, BARS_END - BARS, lambda _offset, _size: self.decode(function))
            function.config.after_write(ROM, 4, lambda _offset, _size: self.decode(function))
            self.functions[slot << 3] = function
            self.table.add(slot << 3, function.config.data, function.config.slow)
            self.decode(function)
        return slot

    def free_slot(self) -> int:
        """The first slot without a function. Raises ConfigError where there is none."""
        for slot in range(SLOTS):
            if slot << 3 not in self.functions:
                return slot
        raise ConfigError(
            "PCI devices", len(self.functions), f"at most {SLOTS - 1} fit beside the host bridge"
        )

    def read(self, devfn: int, register: int, size: int) -> int:
        """A read of configuration space, in bytes of ``register``; all ones where there is no function."""
        function = self.functions.get(devfn)
        if function is None:
            return (1 << (8 * size)) - 1
        with self._lock:
            return function.config.read(register, size)

    def write(self, devfn: int, register: int, size: int, value: int) -> None:
        function = self.functions.get(devfn)
        if function is not None:
            with self._lock:
                function.config.write(register, size, value)

    def decode(self, function: "Function") -> None:
        """Let each BAR of ``function`` answer where its registers say, and others where it made room.

        Writes do this by themselves; after a restore of ``function`` it is to be called.
        """
        with self._lock:
            for bar in function.bars:
                if bar.gpa is not None and bar.gpa != bar.wanted(function.config):
                    self._remove(bar)
            for each in self.functions.values():
                for bar in each.bars:
                    wanted = bar.wanted(each.config)
                    if bar.gpa is None and wanted is not None:
                        self._place(each, bar, wanted)

    def _place(self, function: "Function", bar: "Bar", gpa: int) -> None:
        if not self._is_free(gpa, bar.size) or not self._insert(bar, gpa):
            log.limited(log.DEBUG, f"{function.name}: BAR {bar.index} cannot be at {gpa:#x}")
            return
        bar.gpa = gpa
        self._placed.append(bar)
        if bar.moved is not None:
            bar.moved(gpa)

    def _is_free(self, gpa: int, size: int) -> bool:
        return any((gpa, size) in window for window in self._windows) and not any(
            other.gpa is not None and gpa < other.gpa + other.size and other.gpa < gpa + size
            for other in self._placed
        )

    def _insert(self, bar: "Bar", gpa: int) -> bool:
        """Whether all sections found their place; if not, none did."""
        inserted = []
        try:
            for offset, size, device in bar.sections:
                self._mmio.insert(gpa + offset, size, device)
                inserted.append(gpa + offset)
        except ValueError:  # another device is there
            for base in inserted:
                self._mmio.remove(base)
            return False
        return True

    def _remove(self, bar: "Bar") -> None:
        gpa = bar.gpa
        if gpa is None:
            return
        if bar.moved is not None:
            bar.moved(None)
        for offset, _, _ in bar.sections:
            self._mmio.remove(gpa + offset)
        bar.gpa = None
        self._placed.remove(bar)

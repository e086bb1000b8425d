"""Addresses for BARs: a window of guest-physical space, given out in naturally aligned pieces."""

from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Window:
    """``size`` bytes from ``base`` on. What is outside was never there."""

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size
        self._taken: list[tuple[int, int]] = []  # (gpa, end), in order

    def __contains__(self, piece: tuple[int, int]) -> bool:
        """Whether all of (gpa, size) lies inside."""
        gpa, size = piece
        return self.base <= gpa and gpa + size <= self.base + self.size

    def allocate(self, size: int) -> int | None:
        """The lowest free gpa that is a multiple of ``size``, a power of two; None where there is none."""
        gpa = -(-self.base // size) * size
        for index, (start, end) in enumerate(self._taken):
            if gpa + size <= start:
                return self._take(index, gpa, size)
            gpa = max(gpa, -(-end // size) * size)
        return self._take(len(self._taken), gpa, size)

    def free(self, gpa: int) -> None:
        """Give back what ``allocate`` returned. Raises ValueError for anything else."""
        for index, (start, _) in enumerate(self._taken):
            if start == gpa:
                del self._taken[index]
                return
        raise ValueError(f"{gpa:#x} was not allocated")

    def _take(self, index: int, gpa: int, size: int) -> int | None:
        if (gpa, size) not in self:
            return None
        self._taken.insert(index, (gpa, gpa + size))
        return gpa


def allocate(windows: "Sequence[Window]", size: int) -> int:
    """A gpa in the first of ``windows`` with room for it. Raises ConfigError where none has."""
    for window in windows:
        gpa = window.allocate(size)
        if gpa is not None:
            return gpa
    raise ConfigError("PCI devices", f"of {size:#x} bytes", "no room is left in the guest's address space")

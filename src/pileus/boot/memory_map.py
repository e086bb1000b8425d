"""The memory map that a guest is told, as both boot protocols encode it."""

from pileus.arch.x86_64 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.boot.image import GuestMemory

RAM, RESERVED = 1, 2  # the types of an e820 entry


def memory_map(memory: "GuestMemory") -> list[tuple[int, int, int]]:
    """The (GPA, bytes, type) of each range, ascending.

    RAM has a gap from 640 KiB to 1 MiB. The ACPI tables are in it, in RAM the guest takes for a hole, and
    so is the BIOS area, which is listed as reserved because guests search it.
    """
    entries = [(layout.BIOS_AREA, layout.BIOS_AREA_SIZE, RESERVED)]
    entries.append((layout.PCI_MMCONFIG, layout.PCI_MMCONFIG_SIZE, RESERVED))
    for gpa, size in memory.ranges:
        low = max(0, min(gpa + size, layout.LOW_RAM_END) - gpa)
        start = max(gpa, layout.HIGH_RAM)
        entries.append((gpa, low, RAM))
        entries.append((start, gpa + size - start, RAM))
    return sorted(entry for entry in entries if entry[1] > 0)

"""The PCI host bridge in the DSDT, and the memory its configuration space takes.

Source: ACPI 6.3, 6.4 (Resource Data Types); PCI Firmware 3.3, 4.1.2 (MCFG), 4.3 (resources of a host bridge).
"""

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi.aml import device, eisa_id, name, package
from pileus.arch.x86_64.acpi.resources import (
    bus_numbers,
    io,
    io_window,
    memory32_fixed,
    memory_window32,
    memory_window64,
    resource_template,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

LAST_BUS = (
    0  # Linux scans every bus of MCFG below the last, 32 slots each, whether or not a bridge leads there
)


ALL_FUNCTIONS = 0xFFFF
PIN_A = 0


def host_bridge(above_4g: tuple[int, int] | None, pins: "Sequence[tuple[int, int]]" = ()) -> bytes:
    """``PCI0`` with its windows. ``above_4g`` is the (gpa, size) of the one above RAM, if there is one.

    ``pins`` are (slot, GSI) of the devices that have one, which are those that pass through: all other
    interrupts are messages, and without such a device there is no _PRT. There is no window for VGA, whose
    place is RAM here.
    """
    ports = layout.PORT_PCI
    low, low_end = layout.PCI_MMIO_32BIT, layout.PCI_MMIO_32BIT + layout.PCI_MMIO_32BIT_SIZE
    windows = [
        bus_numbers(0, LAST_BUS),
        io(ports, layout.PORT_PCI_SIZE),
        io_window(0, ports - 1),
        io_window(ports + layout.PORT_PCI_SIZE, 0xFFFF),
        memory_window32(low, low_end - 1),
    ]
    if above_4g is not None:
        gpa, size = above_4g
        windows.append(memory_window64(gpa, gpa + size - 1))
    routes = [package(slot << 16 | ALL_FUNCTIONS, PIN_A, 0, gsi) for slot, gsi in pins]
    return device(
        "PCI0",
        name("_HID", eisa_id("PNP0A08")),
        name("_CID", eisa_id("PNP0A03")),
        name("_SEG", 0),
        name("_BBN", 0),
        name("_UID", 0),
        name("_CRS", resource_template(*windows)),
        *([name("_PRT", package(*routes))] if routes else []),
    )


def motherboard() -> bytes:
    """``MBRD``, which keeps MMCONFIG from being given to anyone: else Linux would not use it."""
    return device(
        "MBRD",
        name("_HID", eisa_id("PNP0C02")),
        name("_UID", 0),
        name("_CRS", resource_template(memory32_fixed(layout.PCI_MMCONFIG, mmconfig_size()))),
    )


def mmconfig_size() -> int:
    """Bytes of configuration space in memory: 1 MiB a bus."""
    return (LAST_BUS + 1) << 20

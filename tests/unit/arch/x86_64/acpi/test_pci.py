"""What the DSDT says of PCI, as iasl reads it; and the window above RAM."""

from collections.abc import Sequence
from typing import Any

import pytest

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi import pci
from pileus.arch.x86_64.acpi.machine import Machine
from pileus.arch.x86_64.layout import GIB, pci_mmio_64bit

from .test_tables import found

ABOVE = (64 * GIB, 960 * GIB)


def dsdt(iasl: Any, above_4g: tuple[int, int] | None, pins: Sequence[tuple[int, int]] = ()) -> str:
    """The disassembly, which compiles to the same again."""
    table = found(Machine([0], devices=[pci.host_bridge(above_4g, pins), pci.motherboard()]))["DSDT"]
    text, rebuilt = iasl.round_trip(table)
    assert rebuilt == table[36:]
    return " ".join(text.split())


def test_the_host_bridge_has_its_windows(iasl: Any) -> None:
    text = dsdt(iasl, ABOVE)
    assert 'EisaId ("PNP0A08")' in text
    assert 'EisaId ("PNP0A03")' in text
    assert "Name (_BBN, Zero)" in text
    assert "0x00000000C0000000, // Range Minimum" not in text
    for value in ("0xC0000000, // Range Minimum", "0xE7FFFFFF, // Range Maximum", "0x28000000, // Length"):
        assert value in text
    for value in ("0x0000001000000000, // Range Minimum", "0x000000FFFFFFFFFF, // Range Maximum"):
        assert value in text
    for value in ("0x0CF7, // Range Maximum", "0x0D00, // Range Minimum"):
        assert value in text
    assert "_PRT" not in text


def test_devices_with_pins_have_routes(iasl: Any) -> None:
    text = dsdt(iasl, None, [(5, 21), (6, 22)])
    for slot, gsi in ((5, 21), (6, 22)):
        assert f"Package (0x04) {{ 0x{slot:04X}FFFF, Zero, Zero, 0x{gsi:X} }}" in text


def test_without_room_above_ram_there_is_one_window_less(iasl: Any) -> None:
    assert "QWordMemory" in dsdt(iasl, ABOVE)
    assert "QWordMemory" not in dsdt(iasl, None)


def test_mmconfig_is_reserved_and_described_alike(iasl: Any) -> None:
    text = dsdt(iasl, None)
    assert 'EisaId ("PNP0C02")' in text
    assert "0xE8000000, // Address Base 0x00100000, // Address Length" in text
    assert pci.mmconfig_size() <= layout.PCI_MMCONFIG_SIZE


@pytest.mark.parametrize(
    ("ram", "bits", "window"),
    [
        (512 << 20, 40, (64 * GIB, (1 << 40) - 64 * GIB)),
        (512 << 20, 52, (64 * GIB, (1 << 46) - 64 * GIB)),
        (4 * GIB, 36, (8 * GIB, 56 * GIB)),
        (3 * GIB, 36, (4 * GIB, 60 * GIB)),
        (100 * GIB, 39, (128 * GIB, 384 * GIB)),
        (60 * GIB, 36, None),
        (63 * GIB, 36, None),
    ],
)
def test_the_window_above_ram_ends_where_addresses_do(
    ram: int, bits: int, window: tuple[int, int] | None
) -> None:
    assert pci_mmio_64bit(ram, bits) == window

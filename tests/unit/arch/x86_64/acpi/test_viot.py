"""VIOT as iasl reads it, and byte by byte."""

import re
from typing import Any

from pileus.arch.x86_64.acpi import viot


def test_it_names_the_iommu_and_each_device_behind_it(iasl: Any) -> None:
    table = viot.encode(0x30, [0x08, 0x18])
    text, rebuilt = iasl.round_trip(table)
    assert rebuilt == table[36:]
    fields = [line.partition(" : ")[2] for line in text.splitlines() if " : " in line]
    names = [re.sub(r".*\]\s*", "", line.partition(" : ")[0]).strip() for line in text.splitlines() if " : " in line]
    assert fields[names.index("Node count")] == "0003"
    assert [fields[index] for index, name in enumerate(names) if name == "PCI BDF number"] == ["0030"]
    assert [fields[index] for index, name in enumerate(names) if name == "PCI BDF start"] == ["0008", "0018"]
    assert [fields[index] for index, name in enumerate(names) if name == "Endpoint start"] == ["00000008", "00000018"]
    assert sum(table) % 256 == 0


def test_its_layout() -> None:
    table = viot.encode(0x30, [0x08])
    assert table[:4] == b"VIOT"
    assert len(table) == 36 + 12 + 16 + 24
    assert table[36:48] == bytes([2, 0, 48, 0]) + bytes(8)
    assert table[48:64] == bytes([3, 0, 16, 0, 0, 0, 0x30, 0]) + bytes(8)
    assert table[64:] == bytes([1, 0, 24, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 8, 0, 48, 0]) + bytes(6)

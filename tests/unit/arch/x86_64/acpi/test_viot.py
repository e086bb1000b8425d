"""VIOT, byte by byte: iasl of Debian 12 does not know it."""

from pileus.arch.x86_64.acpi import viot


def test_it_names_the_iommu_and_each_device_behind_it() -> None:
    table = viot.encode(0x30, [0x08, 0x18])
    assert table[:4] == b"VIOT"
    assert len(table) == 36 + 12 + 16 + 2 * 24 == int.from_bytes(table[4:8], "little")
    assert sum(table) % 256 == 0
    assert table[36:48] == bytes([3, 0, 48, 0]) + bytes(8)
    assert table[48:64] == bytes([3, 0, 16, 0, 0, 0, 0x30, 0]) + bytes(8)
    for at, bdf in ((64, 0x08), (88, 0x18)):
        node = bytes([1, 0, 24, 0, bdf, 0, 0, 0, 0, 0, 0, 0, bdf, 0, bdf, 0, 48, 0]) + bytes(6)
        assert table[at : at + 24] == node

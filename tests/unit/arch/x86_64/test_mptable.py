"""The MP table as Linux finds and reads it. Sizes of entries: MP specification 1.4, table 4-3."""

from struct import unpack_from

import pytest

from pileus.arch.x86_64 import layout, mptable

ENTRY_SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
BIOS_AREA = range(0xF0000, 0x100000, 16)


def found(apic_ids: list[int]) -> tuple[bytes, list[bytes]]:
    """Search as Linux does, then the header and the entries of the table."""
    [(start, data)] = mptable.build(apic_ids)
    pointers = [at for at in BIOS_AREA if data[max(at - start, 0) :][:4] == b"_MP_"]
    assert pointers == [start]
    assert sum(data[:16]) % 256 == 0
    table_gpa, length, version = unpack_from("<IBB", data, 4)
    assert (length, version, data[11]) == (1, 4, 0)
    table = data[table_gpa - start :]
    size, _, _ = unpack_from("<HBB", table, 4)
    assert len(table) == size
    assert sum(table) % 256 == 0
    return table[:44], entries(table[44:])


def entries(data: bytes) -> list[bytes]:
    result = []
    while data:
        size = ENTRY_SIZES[data[0]]
        result.append(data[:size])
        data = data[size:]
    return result


def of_type(kind: int, apic_ids: list[int]) -> list[bytes]:
    return [each for each in found(apic_ids)[1] if each[0] == kind]


@pytest.mark.parametrize("count", [1, 2, 40, 41, 253, 254])
def test_every_cpu_is_listed_in_the_space_there_is(count: int) -> None:
    header, rows = found(list(range(count)))
    assert header[:4] == b"PCMP"
    assert unpack_from("<H", header, 34) == (len(rows),)
    assert unpack_from("<I", header, 36) == (0xFEE00000,)
    assert [row[1] for row in rows if row[0] == 0] == list(range(count))
    [(gpa, data)] = mptable.build(range(count))
    assert gpa >= layout.ACPI_TABLES + layout.ACPI_TABLES_SIZE
    assert len(data) <= layout.MP_TABLE_SIZE


def test_the_first_cpu_boots_and_all_are_enabled() -> None:
    assert [row[3] for row in of_type(0, [0, 1, 2])] == [3, 1, 1]


def test_cpus_that_it_cannot_name_are_left_out() -> None:
    assert [row[1] for row in of_type(0, [0, 4, 254, 255, 256])] == [0, 4, 254]
    assert len(of_type(0, list(range(300)))) == 254


@pytest.mark.parametrize("apic_ids", [[0], [0, 1], [0, 2, 3], list(range(254)), list(range(300))])
def test_the_ioapic_has_an_id_of_its_own(apic_ids: list[int]) -> None:
    [ioapic] = of_type(2, apic_ids)
    assert ioapic[1] not in {row[1] for row in of_type(0, apic_ids)}
    assert ioapic[3] == 1
    assert unpack_from("<I", ioapic, 4) == (0xFEC00000,)


def test_isa_interrupts_go_to_the_pins_of_their_number() -> None:
    [bus] = of_type(1, [0])
    assert bus == b"\x01\x00ISA   "
    [ioapic] = of_type(2, [0])
    rows = of_type(3, [0])
    assert [(row[1], row[4], row[5], row[6], row[7]) for row in rows] == [
        (0, 0, n, ioapic[1], n) for n in range(16)
    ]


def test_lint0_is_extint_and_lint1_nmi_on_every_cpu() -> None:
    assert [(row[1], row[6], row[7]) for row in of_type(4, [0])] == [(3, 255, 0), (1, 255, 1)]


def test_entries_are_in_the_order_of_their_types() -> None:
    kinds = [row[0] for row in found([0, 1])[1]]
    assert kinds == sorted(kinds)

"""NVDIMMs, as iasl and a driver read of them."""

from struct import unpack_from
from typing import Any

from pileus.arch.x86_64.acpi import nfit, tables
from pileus.arch.x86_64.acpi.machine import Machine
from pileus.arch.x86_64.acpi.nfit import Nvdimm
from tests.unit.arch.x86_64.acpi.test_tables import found

GIB, MIB = 1 << 30, 1 << 20
HINT = 0xFE801000
NVDIMMS = [Nvdimm(0, 4 * GIB, 64 * MIB), Nvdimm(1, 5 * GIB, 2 * MIB, HINT), Nvdimm(31, 6 * GIB, GIB, HINT)]


def structures(table: bytes) -> list[tuple[int, bytes]]:
    """(type, what follows the length) of each."""
    data = table[tables.HEADER_SIZE + 4 :]
    result = []
    while data:
        kind, length = unpack_from("<HH", data)
        result.append((kind, data[4:length]))
        data = data[length:]
    return result


def test_iasl_reads_and_rebuilds_the_table(iasl: Any) -> None:
    data = nfit.table(NVDIMMS)
    text, rebuilt = iasl.round_trip(data)
    assert rebuilt == data[36:]
    told = "".join(text.split())
    assert "66F0D379-B4F3-4074-AC43-0D3318B78CDB" in told
    for each in NVDIMMS:
        assert f"AddressRangeBase:{each.gpa:016X}" in told
        assert f"AddressRangeLength:{each.size:016X}" in told
    assert told.count(f"HintAddress:{HINT:016X}") + told.count(f"HintAddress0:{HINT:016X}") == 2


def test_structures_have_the_sizes_of_the_specification() -> None:
    sizes = {0: 56, 1: 48, 4: 80, 6: 24}
    kinds = [(kind, 4 + len(body)) for kind, body in structures(nfit.table(NVDIMMS))]
    assert kinds == [
        (kind, sizes[kind]) for each in NVDIMMS for kind in ([0, 1, 4, 6] if each.hint else [0, 1, 4])
    ]


def test_ranges_dimms_and_control_regions_name_each_other() -> None:
    found = structures(nfit.table(NVDIMMS))
    ranges = {unpack_from("<H", body)[0]: unpack_from("<QQ", body, 28) for kind, body in found if kind == 0}
    controls = {unpack_from("<H", body)[0] for kind, body in found if kind == 4}
    mappings = {}
    for kind, body in found:
        if kind == 1:
            handle, _, _, spa, control, size = unpack_from("<IHHHHQ", body)
            assert control in controls
            assert ranges[spa][1] == size
            mappings[handle] = ranges[spa]
    assert mappings == {each.handle: (each.gpa, each.size) for each in NVDIMMS}
    hints = {unpack_from("<I", body)[0]: unpack_from("<Q", body, 12)[0] for kind, body in found if kind == 6}
    assert hints == {each.handle: each.hint for each in NVDIMMS if each.hint}


def test_the_dsdt_has_a_controller_with_a_child_for_each(iasl: Any) -> None:
    machine = Machine([0], devices=[nfit.root_device(NVDIMMS)], tables=[nfit.table(NVDIMMS)])
    result = found(machine)
    assert sum(result["NFIT"]) % 256 == 0
    text, rebuilt = iasl.round_trip(result["DSDT"])
    assert rebuilt == result["DSDT"][36:]
    told = "".join(text.split())
    assert 'Device(NVDR){Name(_HID,"ACPI0012"' in told
    for each in NVDIMMS:
        address = "One" if each.handle == 1 else f"0x{each.handle:02X}"
        assert f"Device(N{each.index:03X}){{Name(_ADR,{address})" in told

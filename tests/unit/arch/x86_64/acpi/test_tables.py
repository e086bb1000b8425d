"""The tables as a guest reads them: found from the RSDP, checked by sum, by structure and by iasl."""

from itertools import pairwise
from struct import unpack_from
from typing import Any

import pytest

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi import aml, tables
from pileus.arch.x86_64.acpi.machine import Machine
from pileus.errors import ConfigError

MMCONFIG = (0xE8000000, 255)
OVERRIDE = (2, bytes([0, 4]) + (4).to_bytes(4, "little") + bytes(2))
Found = dict[str, bytes]


def found(machine: Machine) -> Found:
    """Walk the tables from the RSDP on: signature -> table."""
    memory = dict(tables.build(machine))
    rsdp = memory[layout.ACPI_TABLES]
    xsdt = memory[unpack_from("<Q", rsdp, 24)[0]]
    result = {"RSDP": rsdp, "XSDT": xsdt}
    for gpa in unpack_from(f"<{(len(xsdt) - 36) // 8}Q", xsdt, 36):
        result[memory[gpa][:4].decode()] = memory[gpa]
    result["DSDT"] = memory[unpack_from("<Q", result["FACP"], 140)[0]]
    return result


def madt_entries(machine: Machine) -> list[tuple[int, bytes]]:
    """(type, what follows the length) of each entry."""
    data = found(machine)["APIC"][44:]
    entries = []
    while data:
        entries.append((data[0], data[2 : data[1]]))
        data = data[data[1] :]
    return entries


def vcpus(machine: Machine) -> list[tuple[int, int, int]]:
    """(UID, APIC id, flags) of each processor entry."""
    rows = []
    for kind, data in madt_entries(machine):
        if kind == 0:
            rows.append((data[0], data[1], unpack_from("<I", data, 2)[0]))
        elif kind == 9:
            apic_id, flags, uid = unpack_from("<III", data, 2)
            rows.append((uid, apic_id, flags))
    return rows


@pytest.mark.parametrize("count", [1, 2, 255, 1024, 4096])
def test_tables_follow_each_other_in_their_place(count: int) -> None:
    built = tables.build(Machine(range(count), mmconfig=MMCONFIG))
    assert [data[:4] for _, data in built] == [b"RSD ", b"DSDT", b"FACP", b"APIC", b"MCFG", b"XSDT"]
    assert built[0][0] == 0xA0000
    for (gpa, data), (following, _) in pairwise(built):
        assert gpa + len(data) <= following < gpa + len(data) + tables.ALIGNMENT
    assert built[-1][0] + len(built[-1][1]) <= layout.ACPI_TABLES + layout.ACPI_TABLES_SIZE


@pytest.mark.parametrize("count", [1, 2, 255, 1024])
def test_every_table_has_its_length_and_sum(count: int) -> None:
    for signature, data in found(Machine(range(count), mmconfig=MMCONFIG)).items():
        assert sum(data) % 256 == 0
        if signature != "RSDP":
            assert unpack_from("<I", data, 4) == (len(data),)
            assert data[10:16] == b"PILEUS"
            assert data[16:24] == f"PL{signature}".ljust(8).encode()
            assert data[28:32] == b"PILE"


def test_the_rsdp_has_both_sums_and_revision_2() -> None:
    rsdp = found(Machine([0]))["RSDP"]
    assert sum(rsdp[:20]) % 256 == 0
    assert rsdp[:8] == b"RSD PTR "
    assert (rsdp[15], unpack_from("<II", rsdp, 16)) == (2, (0, 36))


@pytest.mark.parametrize("count", [1, 2, 255, 1024])
def test_iasl_reads_and_rebuilds_every_table(iasl: Any, count: int) -> None:
    # This iasl drops "online capable" of x2APIC entries, so those vCPUs are all there from the start.
    boot = count if count > 255 else max(1, count // 2)
    machine = Machine(range(count), boot, events=True, mmconfig=MMCONFIG)
    for signature, data in found(machine).items():
        if signature != "RSDP":
            _, rebuilt = iasl.round_trip(data)
            assert rebuilt == data[36:], signature


def test_the_fadt_is_hardware_reduced(iasl: Any) -> None:
    text, _ = iasl.round_trip(found(Machine([0]))["FACP"])
    values = {
        name.strip(): value.strip()
        for name, _, value in (line.rpartition("]")[2].partition(" : ") for line in text.splitlines())
    }
    expected = {
        "Hardware Reduced (V5)": "1",
        "Reset Register Supported (V2)": "1",
        "Value to cause reset": "01",
        "8042 Present on ports 60/64 (V2)": "0",
        "VGA Not Present (V4)": "1",
        "MSI Not Supported (V4)": "0",
        "PCIe ASPM Not Supported (V4)": "1",
        "CMOS RTC Not Present (V5)": "0",
        "RTC Century Index": "32",
        "FADT Minor Revision": "03",
    }
    assert {name: values.get(name) for name in expected} == expected
    assert text.count("Address : 00000000000003C0") == 3


def test_the_fadt_has_the_size_of_its_revision() -> None:
    fadt = found(Machine([0]))["FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 3)


def test_boot_vcpus_are_enabled_and_others_may_come() -> None:
    assert vcpus(Machine([0, 1, 4, 5], 3)) == [(0, 0, 1), (1, 1, 1), (2, 4, 1), (3, 5, 2)]


def test_apic_ids_from_255_on_have_x2apic_entries() -> None:
    machine = Machine([*range(254), 254, 255, 300])
    assert vcpus(machine)[-3:] == [(254, 254, 1), (255, 255, 1), (256, 300, 1)]
    kinds = [kind for kind, _ in madt_entries(machine)]
    assert (kinds.count(0), kinds.count(9), kinds.count(4), kinds.count(10)) == (255, 2, 1, 1)


def test_small_machines_have_no_x2apic_entries() -> None:
    assert {kind for kind, _ in madt_entries(Machine(range(255)))} == {0, 1, 2, 4}


def test_there_is_one_ioapic_and_the_serial_port_is_on_pin_4() -> None:
    entries = madt_entries(Machine([0]))
    assert (1, bytes([0, 0]) + (0xFEC00000).to_bytes(4, "little") + bytes(4)) in entries
    assert OVERRIDE in entries
    assert (4, bytes([0xFF, 0, 0, 1])) in entries


def test_mcfg_covers_the_buses() -> None:
    mcfg = found(Machine([0], mmconfig=MMCONFIG))["MCFG"]
    assert unpack_from("<QHBB", mcfg, 44) == (0xE8000000, 0, 0, 255)
    assert "MCFG" not in found(Machine([0]))


def test_the_power_button_is_notified_by_the_event_device(iasl: Any) -> None:
    text, _ = iasl.round_trip(found(Machine([0], events=True))["DSDT"])
    told = "".join(text.split())
    assert 'Device(GED){Name(_HID,"ACPI0013"' in told
    assert "OperationRegion(GEDR,SystemIO,0x0506,One)" in told
    assert "If((Local0&One)){Notify(\\_SB.PWRB,0x80)" in told
    assert 'EisaId("PNP0C0C")' in told


def test_every_vcpu_has_a_processor_device(iasl: Any) -> None:
    text, _ = iasl.round_trip(found(Machine(range(300), 2))["DSDT"])
    assert text.count('"ACPI0007"') == 300
    assert "Name (_UID, 0x012B)" in text
    assert text.count("Name (_STA, Zero)") == 298


def test_serial_off_takes_the_port_away(iasl: Any) -> None:
    with_serial, _ = iasl.round_trip(found(Machine([0]))["DSDT"])
    without, _ = iasl.round_trip(found(Machine([0], serial=False))["DSDT"])
    assert "PNP0501" in with_serial
    assert "PNP0501" not in without
    assert "Interrupt (" not in without  # the reference's test 18: nothing on the IO-APIC


def test_devices_bring_their_own_aml_and_tables(iasl: Any) -> None:
    device = aml.device("VIO0", aml.name("_HID", "LNRO0005"), aml.name("_UID", 0))
    extra = tables.table(b"SSDT", 2, aml.name("\\EXTR", 1))
    result = found(Machine([0], devices=[device], tables=[extra]))
    assert '"LNRO0005"' in iasl.round_trip(result["DSDT"])[0]
    assert result["SSDT"] == extra


def test_tables_that_do_not_fit_are_refused() -> None:
    extra = tables.table(b"SSDT", 2, bytes(layout.ACPI_TABLES_SIZE))
    with pytest.raises(ConfigError, match="do not fit"):
        tables.build(Machine([0], tables=[extra]))


def test_too_many_vcpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--cpus 4097: "):
        tables.build(Machine(range(4097)))

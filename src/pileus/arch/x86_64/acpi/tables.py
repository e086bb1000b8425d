"""The ACPI tables of a machine, and where in guest memory each one goes.

The RSDP comes first, at ``layout.ACPI_TABLES``; then DSDT, FADT, MADT, MCFG if there is one, whatever
tables the devices bring, and the XSDT that lists them.

Source: ACPI 6.3, 5.2 (ACPI System Description Tables); PCI Firmware 3.3, 4.1.2 (MCFG).
"""

from struct import pack, pack_into

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi import dsdt, madt
from pileus.arch.x86_64.acpi.machine import Machine
from pileus.errors import ConfigError

OEM_ID, CREATOR_ID = b"PILEUS", b"PILE"
HYPERVISOR = b"PILEUS\0\0"
HEADER_SIZE = 36
CHECKSUM_OFFSET = 9
ALIGNMENT = 8

RSDP_SIZE, RSDP_V1_SIZE = 36, 20
FADT_SIZE = 276

# FADT, 5.2.9: flags, and what the boot architecture has or lacks.
WBINVD, PWR_BUTTON, SLP_BUTTON, FIX_RTC = 1 << 0, 1 << 4, 1 << 5, 1 << 6
RESET_REG_SUP, HEADLESS, HW_REDUCED_ACPI = 1 << 10, 1 << 12, 1 << 20
VGA_NOT_PRESENT, PCIE_ASPM_CONTROLS = 1 << 2, 1 << 4
RTC_CENTURY = 0x32  # index in CMOS
RESET_VALUE = 1
POWER_REGISTER = pack("<BBBBQ", 1, 8, 0, 1, layout.PORT_POWER)  # generic address: port, 8 bits, bytes
FADT_FIELDS = {  # name -> offset, struct code, value; all else is zero
    "CENTURY": (108, "<B", RTC_CENTURY),
    # No legacy devices to look for, no 8042 keyboard controller; a CMOS RTC and MSI are there.
    "IAPC_BOOT_ARCH": (109, "<H", VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS),
    # The buttons and the RTC have no fixed-hardware events.
    "Flags": (
        112,
        "<I",
        WBINVD | PWR_BUTTON | SLP_BUTTON | FIX_RTC | RESET_REG_SUP | HEADLESS | HW_REDUCED_ACPI,
    ),
    "RESET_REG": (116, "12s", POWER_REGISTER),
    "RESET_VALUE": (128, "<B", RESET_VALUE),
    "FADT Minor Version": (131, "<B", 3),
    "SLEEP_CONTROL_REG": (244, "12s", POWER_REGISTER),
    "SLEEP_STATUS_REG": (256, "12s", POWER_REGISTER),
    "Hypervisor Vendor Identity": (268, "8s", HYPERVISOR),
}
X_DSDT_OFFSET = 140


def build(machine: Machine) -> list[tuple[int, bytes]]:
    """Every table of ``machine`` with the GPA it was made for.

    Raises ConfigError for more vCPUs than there are names, or than fit in ``layout.ACPI_TABLES_SIZE``.
    """
    if len(machine.apic_ids) > dsdt.MAX_VCPUS:
        raise ConfigError("--cpus", len(machine.apic_ids), f"at most {dsdt.MAX_VCPUS} are allowed")
    placed: list[tuple[int, bytes]] = []
    end = layout.ACPI_TABLES + RSDP_SIZE

    def place(data: bytes) -> int:
        nonlocal end
        gpa = -(-end // ALIGNMENT) * ALIGNMENT
        placed.append((gpa, data))
        end = gpa + len(data)
        return gpa

    dsdt_gpa = place(table(b"DSDT", 6, dsdt.encode(machine)))
    listed = [place(_fadt(dsdt_gpa)), place(table(b"APIC", madt.REVISION, madt.encode(machine)))]
    if machine.mmconfig is not None:
        listed.append(place(_mcfg(*machine.mmconfig)))
    listed += map(place, machine.tables)
    xsdt = place(table(b"XSDT", 1, pack(f"<{len(listed)}Q", *listed)))
    if end > layout.ACPI_TABLES + layout.ACPI_TABLES_SIZE:
        raise ConfigError("--cpus", len(machine.apic_ids), "are too many: their ACPI tables do not fit")
    return [(layout.ACPI_TABLES, _rsdp(xsdt)), *placed]


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """``body`` behind the header that every table but the RSDP has, checksum included."""
    oem_table_id = (b"PL" + signature).ljust(8)
    length = HEADER_SIZE + len(body)
    header = pack("<4sIBB6s8sI4sI", signature, length, revision, 0, OEM_ID, oem_table_id, 1, CREATOR_ID, 1)
    data = bytearray(header + body)
    data[CHECKSUM_OFFSET] = checksum(data)
    return bytes(data)


def checksum(data: bytes | bytearray) -> int:
    """The byte that, put where ``data`` has a zero, makes the sum of all its bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def _rsdp(xsdt: int) -> bytes:
    data = bytearray(pack("<8sB6sBIIQI", b"RSD PTR ", 0, OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0))
    data[8] = checksum(data[:RSDP_V1_SIZE])
    data[32] = checksum(data)
    return bytes(data)


def _fadt(dsdt_gpa: int) -> bytes:
    data = bytearray(FADT_SIZE)
    for offset, code, value in FADT_FIELDS.values():
        pack_into(code, data, offset, value)
    pack_into("<Q", data, X_DSDT_OFFSET, dsdt_gpa)
    return table(b"FACP", 6, bytes(data[HEADER_SIZE:]))


def _mcfg(base: int, last_bus: int) -> bytes:
    """Configuration space of segment 0, buses 0 to ``last_bus``."""
    return table(b"MCFG", 1, bytes(8) + pack("<QHBBI", base, 0, 0, last_bus, 0))

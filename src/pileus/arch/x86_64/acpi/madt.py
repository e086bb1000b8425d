"""The MADT: vCPUs and interrupt controllers.

Source: ACPI 6.3, 5.2.12 (Multiple APIC Description Table).
"""

from struct import pack

from pileus.arch.x86_64 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.arch.x86_64.acpi.machine import Machine

REVISION = 5
LOCAL_APIC_TYPE, IOAPIC_TYPE, OVERRIDE_TYPE, LOCAL_NMI_TYPE = 0, 1, 2, 4
X2APIC_TYPE, X2APIC_NMI_TYPE = 9, 10
ENABLED, ONLINE_CAPABLE = 1 << 0, 1 << 1
MAX_XAPIC_ID = 254  # 255 addresses all
ALL_PROCESSORS, ALL_X2APIC_PROCESSORS = 0xFF, 0xFFFFFFFF
NMI_PIN = 1  # LINT1


def encode(machine: "Machine") -> bytes:
    """The MADT without its header. No 8259 is reported: interrupts come by the IOAPIC and by message."""
    entries = [pack("<II", layout.LOCAL_APIC, 0)]
    for index, apic_id in enumerate(machine.apic_ids):
        entries.append(_vcpu(index, apic_id, ENABLED if index < machine.boot_vcpus else ONLINE_CAPABLE))
    entries.append(pack("<BBBBII", IOAPIC_TYPE, 12, 0, 0, layout.IOAPIC, 0))
    entries.append(pack("<BBBBIH", OVERRIDE_TYPE, 10, 0, layout.GSI_COM1, layout.GSI_COM1, 0))
    entries.append(pack("<BBBHB", LOCAL_NMI_TYPE, 6, ALL_PROCESSORS, 0, NMI_PIN))
    if any(map(_needs_x2apic, range(len(machine.apic_ids)), machine.apic_ids)):
        entries.append(pack("<BBHIB3x", X2APIC_NMI_TYPE, 12, 0, ALL_X2APIC_PROCESSORS, NMI_PIN))
    return b"".join(entries)


def _vcpu(index: int, apic_id: int, flags: int) -> bytes:
    """A local APIC entry, or the longer one where the number of the vCPU or its APIC needs it."""
    if _needs_x2apic(index, apic_id):
        return pack("<BBHIII", X2APIC_TYPE, 16, 0, apic_id, flags, index)
    return pack("<BBBBI", LOCAL_APIC_TYPE, 8, index, apic_id, flags)


def _needs_x2apic(index: int, apic_id: int) -> bool:
    return max(index, apic_id) > MAX_XAPIC_ID

"""The DSDT: the devices that cannot be found by asking a bus, and how to power off.

Source: ACPI 6.3, 5.2.11.1 (DSDT), 5.6.9 (GED), 8.4 (Declaring Processors), 7.4.2 (\\_Sx);
QEMU's docs/specs/pvpanic.
"""

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi.aml import (
    BYTE_ACCESS,
    LOCAL0,
    SYSTEM_IO,
    WRITE_AS_ZEROS,
    and_,
    device,
    eisa_id,
    field,
    if_,
    method,
    name,
    notify,
    operation_region,
    package,
    path,
    scope,
    store,
)
from pileus.arch.x86_64.acpi.resources import interrupt, io, resource_template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.arch.x86_64.acpi.machine import Machine

MAX_VCPUS = 0x1000  # C000 to CFFF
S5_SLEEP_TYPE = 5
ABSENT = 0
POWER_BUTTON = 1 << 0  # an event of devices.ged
PRESSED = 0x80
PRESENT = 0xF  # present, enabled, shown, working


def encode(machine: "Machine") -> bytes:
    """The terms of the DSDT, without its header."""
    devices = [_vcpus(machine), _rtc(), _pvpanic(), *machine.devices]
    if machine.events:
        devices += [_power_button(), _ged()]
    if machine.serial:
        devices.append(_com1())
    return scope("\\_SB", *devices) + name("\\_S5", package(S5_SLEEP_TYPE))


def _vcpus(machine: "Machine") -> bytes:
    """One processor device per vCPU, tied to its MADT entry by ``_UID``; those to come are absent."""
    hid = name("_HID", "ACPI0007")
    absent = name("_STA", ABSENT)
    return device(
        "CPUS",
        name("_HID", "ACPI0010"),
        name("_CID", eisa_id("PNP0A05")),
        *(
            device(
                f"C{index:03X}",
                hid,
                name("_UID", index),
                absent if index >= machine.boot_vcpus else b"",
            )
            for index in range(len(machine.apic_ids))
        ),
    )


def _com1() -> bytes:
    return device(
        "COM1",
        name("_HID", eisa_id("PNP0501")),
        name("_UID", 0),
        name("_CRS", resource_template(io(layout.PORT_COM1, 8), interrupt(layout.GSI_COM1))),
    )


def _rtc() -> bytes:
    """It has no interrupt. Without this device Linux would assume one, on IRQ 8."""
    return device(
        "RTC",
        name("_HID", eisa_id("PNP0B00")),
        name("_CRS", resource_template(io(layout.PORT_CMOS, 2))),
    )


def _pvpanic() -> bytes:
    return device(
        "PEVT",
        name("_HID", "QEMU0001"),
        name("_STA", PRESENT),
        name("_CRS", resource_template(io(layout.PORT_PVPANIC, 1))),
    )


def _power_button() -> bytes:
    return device("PWRB", name("_HID", eisa_id("PNP0C0C")), name("_UID", 0))


def _ged() -> bytes:
    """Its interrupt has a guest take the events from a port and notify whom they are for."""
    return device(
        "GED",
        name("_HID", "ACPI0013"),
        name("_UID", 0),
        name("_CRS", resource_template(interrupt(layout.GSI_GED))),
        operation_region("GEDR", SYSTEM_IO, layout.PORT_GED, 1),
        field("GEDR", BYTE_ACCESS | WRITE_AS_ZEROS, ("EVTS", 8)),
        method(
            "_EVT",
            store(path("EVTS"), LOCAL0),
            if_(and_(LOCAL0, POWER_BUTTON), notify(path("\\_SB.PWRB"), PRESSED)),
            args=1,
            serialized=True,
        ),
    )

"""The DSDT: the devices that cannot be found by asking a bus, and how to power off.

Source: ACPI 6.3, 5.2.11.1 (DSDT), 8.4 (Declaring Processors), 7.4.2 (\\_Sx); QEMU's docs/specs/pvpanic.
"""

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi.aml import device, eisa_id, name, package, scope
from pileus.arch.x86_64.acpi.resources import interrupt, io, resource_template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.arch.x86_64.acpi.machine import Machine

MAX_VCPUS = 0x1000  # C000 to CFFF
S5_SLEEP_TYPE = 5
ABSENT = 0
PRESENT = 0xF  # present, enabled, shown, working


def encode(machine: "Machine") -> bytes:
    """The terms of the DSDT, without its header."""
    devices = [_vcpus(machine), _rtc(), _pvpanic(), *machine.devices]
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

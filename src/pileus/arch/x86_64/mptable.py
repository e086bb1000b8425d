"""The MP table: how a guest booted with ``acpi=off`` finds its CPUs and its IOAPIC.

Linux looks for the floating pointer in the first KiB of memory, the last KiB below 640 KiB and the BIOS
area. It is in the BIOS area with the table right behind it, where 254 CPUs have room.

What Linux does with the interrupt entries: they say only which pin an ISA interrupt would arrive at, and
nothing asks for one but a driver that finds its device. There is no 8259, which Linux notices as it probes
for it, so that it takes no ISA interrupt for granted and skips the check of a timer on pin 0 or 2.

Source: Intel MultiProcessor Specification 1.4, 4 (MP Configuration Table).
"""

from struct import pack

from pileus.arch.x86_64 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CPUS = 254  # an APIC id has 8 bits, 255 addresses all, and the IOAPIC has an id too
SPECIFICATION_1_4 = 4
PROCESSOR, BUS, IOAPIC, INTERRUPT, LOCAL_INTERRUPT = range(5)  # entry types
ENABLED, BOOT_CPU = 1 << 0, 1 << 1
APIC_VERSION = 0x14
SIGNATURE_FEATURES = (0x600, 0x201)  # a Pentium Pro with FPU and APIC: guests ask CPUID instead
IOAPIC_VERSION = 0x11
INT, NMI, EXT_INT = 0, 1, 3  # interrupt types
ISA_BUS = 0
ISA_INTERRUPTS = 16
ALL_APICS = 0xFF
POINTER_SIZE, HEADER_SIZE = 16, 44


def build(apic_ids: "Sequence[int]") -> list[tuple[int, bytes]]:
    """The floating pointer and the table for these CPUs, with the GPA they were made for.

    The first CPU boots. Those that the table cannot name, past 254 or with an APIC id above 254, are left
    out: a guest that wants them uses ACPI.
    """
    named = [each for each in apic_ids if each < ALL_APICS][:MAX_CPUS]
    return [(layout.MP_TABLE, _pointer() + _table(_entries(named)))]


def _pointer() -> bytes:
    table = layout.MP_TABLE + POINTER_SIZE
    return _sealed(pack("<4sIBBB5x", b"_MP_", table, POINTER_SIZE // 16, SPECIFICATION_1_4, 0), 10)


def _table(entries: list[bytes]) -> bytes:
    body = b"".join(entries)
    header = pack(
        "<4sHBB8s12sIHHIHBx",
        *(b"PCMP", HEADER_SIZE + len(body), SPECIFICATION_1_4, 0, b"PILEUS  ", b"VM".ljust(12)),
        *(0, 0, len(entries), layout.LOCAL_APIC, 0, 0),  # no OEM table, no extended entries
    )
    return _sealed(header + body, 7)


def _entries(apic_ids: "Sequence[int]") -> list[bytes]:
    """In the order of their types, as the specification wants them."""
    ioapic = _free_id(apic_ids)
    cpus = (
        pack(
            "<BBBBII8x",
            *(PROCESSOR, apic_id, APIC_VERSION, ENABLED | (0 if index else BOOT_CPU), *SIGNATURE_FEATURES),
        )
        for index, apic_id in enumerate(apic_ids)
    )
    return [
        *cpus,
        pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        pack("<BBBBI", IOAPIC, ioapic, IOAPIC_VERSION, 1, layout.IOAPIC),
        *(pack("<BBHBBBB", INTERRUPT, INT, 0, ISA_BUS, n, ioapic, n) for n in range(ISA_INTERRUPTS)),
        pack("<BBHBBBB", LOCAL_INTERRUPT, EXT_INT, 0, ISA_BUS, 0, ALL_APICS, 0),
        pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, ISA_BUS, 0, ALL_APICS, 1),
    ]


def _free_id(apic_ids: "Sequence[int]") -> int:
    """The lowest id that no CPU has: the IOAPIC needs one of its own."""
    taken = set(apic_ids)
    return next(each for each in range(ALL_APICS) if each not in taken)


def _sealed(data: bytes, checksum_offset: int) -> bytes:
    """``data`` with the byte there, a zero, set so that the sum of all is 0 modulo 256."""
    sealed = bytearray(data)
    sealed[checksum_offset] = -sum(data) & 0xFF
    return bytes(sealed)

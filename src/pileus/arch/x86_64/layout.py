"""Where things are in a guest's physical address space, and which ports and GSIs they use.

Source: the memory map of Cloud Hypervisor 0.3, which guests and tests know.
"""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_SIZE = 4 * KIB

# Below 1 MiB: what the boot protocols hand over. Addresses are GPAs.
GDT = 0x500
IDT = 0x520
PVH_START_INFO = 0x6000  # hvm_start_info, then its module list and memory map
PVH_START_INFO_SIZE = 0x1000
ZERO_PAGE = 0x7000  # boot_params
BOOT_STACK_TOP = 0x8FF0
PML4 = 0x9000
PDPT = 0xA000
PAGE_DIRECTORY = 0xB000
CMDLINE = 0x20000
CMDLINE_MAX = 64 * KIB  # bytes, the NUL included
LOW_RAM_END = 0xA0000  # e820 lists RAM up to here, then from 1 MiB
ACPI_TABLES = 0xA0000  # the RSDP is the first of them; the RAM here is not in the e820 map
ACPI_TABLES_SIZE = 0x50000
BIOS_AREA = 0xF0000  # reserved in the e820 map; guests search it for tables, every 16 bytes
BIOS_AREA_SIZE = 0x10000
MP_TABLE = 0xF0000  # floating pointer, then the table: the first thing a search finds
MP_TABLE_SIZE = 0x2000
RESET_VECTOR = 0xFFFF0  # f000:fff0 in real mode, 16 bytes
HIGH_RAM = 0x100000  # kernels start here or above
IDENTITY_MAPPED = GIB  # what the boot page tables map: a kernel entered in 64-bit mode lies below

# The hole below 4 GiB.
RAM_32BIT_END = 3 * GIB
PCI_MMIO_32BIT = 0xC0000000
PCI_MMIO_32BIT_SIZE = 640 * MIB
PCI_MMCONFIG = 0xE8000000
PCI_MMCONFIG_SIZE = 256 * MIB
VIRTIO_MMIO = 0xFE000000  # a page of registers per device, where there is no PCI
VIRTIO_MMIO_SIZE = 4 * MIB
NVDIMM_FLUSH = 0xFE800000  # a page per NVDIMM: a write there makes what was stored durable
IOAPIC = 0xFEC00000
LOCAL_APIC = 0xFEE00000
KVM_IDENTITY_MAP = 0xFFFBC000  # one page, used by KVM on Intel only
KVM_TSS = 0xFFFBD000  # three pages, likewise
RAM_64BIT = 4 * GIB  # RAM beyond 3 GiB goes on here; devices live above its end
PERSISTENT_ALIGNMENT = 128 * MIB  # Linux's memory sections: older kernels hand out whole ones
PCI_MMIO_64BIT_MAX_BITS = 46  # no address beyond: what every host with that many, or more, can map

# Ports.
PORT_I8042 = 0x60  # 0x60 to 0x64; 0x61 is the NMI status port
PORT_CMOS = 0x70  # index, then data
PORT_DEBUG = 0x80
PORT_COM1 = 0x3F8
PORT_POWER = 0x3C0  # ACPI sleep control, sleep status and reset register in one
PORT_PVPANIC = 0x505
PORT_GED = 0x506  # events that wait for the guest
PORT_PCI, PORT_PCI_SIZE = 0xCF8, 8  # configuration space: address, data

# GSIs: the IOAPIC has pins 0 to 23, message-signalled interrupts come after.
IOAPIC_PINS = 24
GSI_GED = 3
GSI_COM1 = 4
GSI_FIRST_PIN = 5
GSI_PCI_PIN = 16  # of slot 0, then one a slot, eight in turn
PCI_PINS = 8
GSI_FIRST_MSI = 24


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """The (GPA, bytes) of each RAM region of a guest with ``size`` bytes: one, or two around the hole."""
    if size <= RAM_32BIT_END:
        return [(0, size)]
    return [(0, RAM_32BIT_END), (RAM_64BIT, size - RAM_32BIT_END)]


def persistent_ranges(ram_size: int, sizes: list[int], phys_bits: int) -> list[tuple[int, int]]:
    """The (GPA, bytes) of each persistent memory of ``sizes``: one after the other, right above RAM.

    Linux maps memory devices only near RAM: a randomised direct map has room for 10 TiB more. Fewer than
    ``sizes`` come back where the rest would pass the end of what a guest can address.
    """
    ranges: list[tuple[int, int]] = []
    end = _ram_end(ram_size)
    for size in sizes:
        start = -(-end // PERSISTENT_ALIGNMENT) * PERSISTENT_ALIGNMENT
        end = start + size
        if end > _device_end(phys_bits):
            break
        ranges.append((start, size))
    return ranges


def pci_mmio_64bit(ram_size: int, phys_bits: int, used_end: int = 0) -> tuple[int, int] | None:
    """The (GPA, bytes) for 64-bit BARs: above RAM and ``used_end``, to the end of what a guest can address.

    It starts at a multiple of 64 GiB or, in the small address spaces of some CPUs, at one of 4 GiB. None
    where RAM leaves no room at all.
    """
    begin, end = max(_ram_end(ram_size), used_end), _device_end(phys_bits)
    for alignment in (64 * GIB, 4 * GIB):
        start = -(-begin // alignment) * alignment
        if start < end:
            return start, end - start
    return None


def _ram_end(ram_size: int) -> int:
    """Where devices above 4 GiB may begin."""
    base, size = ram_ranges(ram_size)[-1]
    return max(base + size, RAM_64BIT)


def _device_end(phys_bits: int) -> int:
    return 1 << min(phys_bits, PCI_MMIO_64BIT_MAX_BITS)

"""The zero page (``struct boot_params``): what the 64-bit Linux boot protocol hands to the kernel.

Source: Documentation/arch/x86/boot.rst and zero-page.rst of Linux, <asm/bootparam.h>.
"""

from struct import Struct, pack_into

from pileus.arch.x86_64.layout import CMDLINE, PAGE_SIZE

SETUP_HEADER = 0x1F1
LOADER_TYPE_UNKNOWN = 0xFF  # a loader without an assigned number
FIELDS = {  # name in struct boot_params (hdr. left out) -> offset, struct code
    "acpi_rsdp_addr": (0x070, "<Q"),
    "ext_ramdisk_image": (0x0C0, "<I"),
    "ext_ramdisk_size": (0x0C4, "<I"),
    "e820_entries": (0x1E8, "<B"),
    "boot_flag": (0x1FE, "<H"),
    "header": (0x202, "<I"),
    "version": (0x206, "<H"),
    "type_of_loader": (0x210, "<B"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "ramdisk_image": (0x218, "<I"),
    "ramdisk_size": (0x21C, "<I"),
    "cmd_line_ptr": (0x228, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "cmdline_size": (0x238, "<I"),
}
MADE_UP_HEADER = {  # an ELF brings no setup header of its own
    "boot_flag": 0xAA55,
    "header": int.from_bytes(b"HdrS", "little"),
    "version": 0x20C,
    "loadflags": 1,
    "initrd_addr_max": 0xFFFFFFFF,
    "kernel_alignment": 16 << 20,
}
E820_TABLE = 0x2D0
E820_ENTRY = Struct("<QQI")
E820_MAX = 128


def encode(
    setup_header: bytes,
    memory_map: list[tuple[int, int, int]],
    *,
    code: int,
    cmdline_size: int,
    initramfs: tuple[int, int],
    rsdp: int,
) -> bytes:
    """The page, with the kernel's own ``setup_header`` (empty: made up) and the loader's part filled in.

    ``code`` is where the kernel was loaded; ``cmdline_size`` counts the NUL; ``initramfs`` is (GPA, size),
    or (0, 0); ``rsdp`` the GPA of the ACPI root pointer, or 0.
    """
    page = bytearray(PAGE_SIZE)
    page[SETUP_HEADER : SETUP_HEADER + len(setup_header)] = setup_header
    if not setup_header:
        _fill(page, MADE_UP_HEADER | {"cmdline_size": cmdline_size})
    image, size = initramfs
    _fill(
        page,
        {
            "acpi_rsdp_addr": rsdp,
            "ext_ramdisk_image": image >> 32,
            "ext_ramdisk_size": size >> 32,
            "e820_entries": min(len(memory_map), E820_MAX),
            "type_of_loader": LOADER_TYPE_UNKNOWN,
            "code32_start": code,
            "ramdisk_image": image & 0xFFFFFFFF,
            "ramdisk_size": size & 0xFFFFFFFF,
            "cmd_line_ptr": CMDLINE,
        },
    )
    for index, entry in enumerate(memory_map[:E820_MAX]):
        E820_ENTRY.pack_into(page, E820_TABLE + index * E820_ENTRY.size, *entry)
    return bytes(page)


def _fill(page: bytearray, values: dict[str, int]) -> None:
    for name, value in values.items():
        offset, code = FIELDS[name]
        pack_into(code, page, offset, value)

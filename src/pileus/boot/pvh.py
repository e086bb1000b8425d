"""PVH: the 32-bit entry that Xen defined and KVM guests share, and the structure it is handed.

Source: Xen's public/arch-x86/hvm/start_info.h (struct hvm_start_info version 1).
"""

from struct import Struct

from pileus.arch.x86_64.layout import CMDLINE, PVH_START_INFO, PVH_START_INFO_SIZE

MAGIC = 0x336EC578  # "xEn3" with the high bit of the E set
VERSION = 1  # the first with a memory map
# magic, version, flags, modules, modlist, cmdline, rsdp, memmap, memmap entries, reserved
START_INFO = Struct("<IIII QQQQ II")
MODULE = Struct("<QQQQ")  # GPA, size, command line GPA, reserved
MEMMAP_ENTRY = Struct("<QQII")  # GPA, size, e820 type, reserved
MODULES = PVH_START_INFO + START_INFO.size
MEMMAP = MODULES + MODULE.size
MEMMAP_MAX = (PVH_START_INFO + PVH_START_INFO_SIZE - MEMMAP) // MEMMAP_ENTRY.size


def encode(memory_map: list[tuple[int, int, int]], *, initramfs: tuple[int, int], rsdp: int) -> bytes:
    """The start info with its module list and memory map, to be put at ``PVH_START_INFO``.

    ``initramfs`` is (GPA, size), or (0, 0); ``rsdp`` the GPA of the ACPI root pointer, or 0.
    """
    entries = memory_map[:MEMMAP_MAX]
    modules = 1 if initramfs[1] else 0
    return b"".join(
        [
            START_INFO.pack(MAGIC, VERSION, 0, modules, MODULES, CMDLINE, rsdp, MEMMAP, len(entries), 0),
            MODULE.pack(*initramfs, 0, 0),
            *(MEMMAP_ENTRY.pack(*entry, 0) for entry in entries),
        ]
    )

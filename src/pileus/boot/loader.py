"""Loads a kernel, its initramfs and its command line, and writes what the boot protocol hands over.

A format or protocol is imported when a kernel turns out to need it: a start pays only for its own.
"""

from pileus.arch.x86_64.layout import ACPI_TABLES, CMDLINE, PVH_START_INFO, ZERO_PAGE
from pileus.boot import cmdline as kernel_cmdline
from pileus.boot.image import Image
from pileus.boot.memory_map import memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.boot.bzimage import BzImage
    from pileus.boot.elf import Elf
    from pileus.boot.image import GuestMemory

ELF_MAGIC = b"\x7fELF"
LINUX64, PVH = "linux64", "pvh"


class Entry:
    """How the boot vCPU starts.

    ``protocol`` is LINUX64 (64-bit mode, paging on, zero page in ``rsi``) or PVH (32-bit protected mode,
    paging off, start info in ``rbx``). Registers are GPAs; one that the protocol does not use is 0.
    """

    __slots__ = ("protocol", "rbx", "rip", "rsi")

    def __init__(self, protocol: str, rip: int, *, rsi: int = 0, rbx: int = 0) -> None:
        self.protocol = protocol
        self.rip = rip
        self.rsi = rsi
        self.rbx = rbx

    def __repr__(self) -> str:
        return f"Entry({self.protocol!r}, {self.rip:#x}, rsi={self.rsi:#x}, rbx={self.rbx:#x})"


def load(
    memory: "GuestMemory",
    kernel: str,
    cmdline: str = "",
    initramfs_path: str | None = None,
    *,
    rsdp: int = ACPI_TABLES,
    allow_pvh: bool = True,
) -> Entry:
    """Make ``memory`` ready to boot the kernel at path ``kernel``, and say where it starts.

    An ELF with a PVH entry point is entered there unless ``allow_pvh`` is false. ``rsdp`` is the GPA of
    the ACPI root pointer, 0 if there is none. Raises ConfigError naming ``--kernel``, ``--initramfs`` or
    ``--cmdline``, or HostError if reading fails.
    """
    with Image("--kernel", kernel) as image:
        program = _parse(image, allow_pvh)
        line = kernel_cmdline.encode(cmdline, program.cmdline_max)
        program.load(memory)
    ramdisk = _load_initramfs(memory, initramfs_path, program)
    memory.write(CMDLINE, line)
    if program.pvh_entry is not None:
        return _start_pvh(memory, program.pvh_entry, ramdisk, rsdp)
    return _start_linux64(memory, program, len(line), ramdisk, rsdp)


def _parse(image: Image, allow_pvh: bool) -> "Elf | BzImage":
    if image.read(0, min(image.size, len(ELF_MAGIC))) == ELF_MAGIC:
        from pileus.boot.elf import Elf

        return Elf(image, allow_pvh=allow_pvh)
    from pileus.boot.bzimage import BzImage

    return BzImage(image)


def _load_initramfs(memory: "GuestMemory", path: str | None, program: "Elf | BzImage") -> tuple[int, int]:
    if path is None:
        return 0, 0
    from pileus.boot import initramfs

    return initramfs.load(memory, path, program)


def _start_pvh(memory: "GuestMemory", entry: int, ramdisk: tuple[int, int], rsdp: int) -> Entry:
    from pileus.boot import pvh

    memory.write(PVH_START_INFO, pvh.encode(memory_map(memory), initramfs=ramdisk, rsdp=rsdp))
    return Entry(PVH, entry, rbx=PVH_START_INFO)


def _start_linux64(
    memory: "GuestMemory", program: "Elf | BzImage", cmdline_size: int, ramdisk: tuple[int, int], rsdp: int
) -> Entry:
    from pileus.boot import zero_page

    page = zero_page.encode(
        program.setup_header,
        memory_map(memory),
        code=program.occupied[0],
        cmdline_size=cmdline_size,
        initramfs=ramdisk,
        rsdp=rsdp,
    )
    memory.write(ZERO_PAGE, page)
    return Entry(LINUX64, program.entry, rsi=ZERO_PAGE)

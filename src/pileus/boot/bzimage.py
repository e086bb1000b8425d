"""bzImage: the compressed Linux kernel, entered at its 64-bit entry point.

Source: Documentation/arch/x86/boot.rst of Linux ("The Real-Mode Kernel Header", "64-bit Boot Protocol").
"""

from struct import unpack_from

from pileus.arch.x86_64.layout import HIGH_RAM, IDENTITY_MAPPED
from pileus.boot.image import Image, in_ram, mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.boot.image import GuestMemory

HEADER = 0x1F1  # where the setup header begins, in the file and in the zero page
HEADER_END_MAX = 0x290  # the zero page has no room for more
MAGIC_OFFSET, MAGIC = 0x202, b"HdrS"
BOOT_FLAG = 0xAA55
VERSION_2_12 = 0x20C  # Linux 3.8: the first to say in xloadflags whether there is a 64-bit entry
LOADED_HIGH = 1 << 0
KERNEL_64, CAN_BE_LOADED_ABOVE_4G = 1 << 0, 1 << 1  # of xloadflags
ENTRY_64 = 0x200  # from the start of the protected-mode part
FIELDS = {  # name in struct setup_header -> offset in the file, struct code
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "version": (0x206, "<H"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}


class BzImage:
    """A 64-bit bzImage whose header is sound.

    The protected-mode part goes to ``gpa``: where the kernel wants to run, so that it need not move. It
    decompresses itself in place there, in ``init_size`` bytes.
    """

    pvh_entry = None  # only an ELF has one

    __slots__ = ("_fields", "gpa", "image", "length", "offset", "setup_header")

    def __init__(self, image: Image) -> None:
        """Raises ConfigError for a file that is not such a kernel."""
        self.image = image
        start = image.read(0, min(image.size, HEADER_END_MAX))
        if start[MAGIC_OFFSET : MAGIC_OFFSET + 4] != MAGIC:
            raise image.refuse("is not a kernel: an ELF vmlinux or a bzImage is needed")
        image.check_holds(0, HEADER_END_MAX)
        self._fields = {name: unpack_from(code, start, at)[0] for name, (at, code) in FIELDS.items()}
        self._check_protocol()
        end = MAGIC_OFFSET + start[MAGIC_OFFSET - 1]  # the byte before the magic is the jump over the header
        self.setup_header = start[HEADER : min(end, HEADER_END_MAX)]
        self.offset = 512 * (1 + (self._fields["setup_sects"] or 4))
        self.length = 16 * self._fields["syssize"]
        self.gpa: int = self._fields["pref_address"] or self._fields["code32_start"]
        self._check_part()

    @property
    def entry(self) -> int:
        return self.gpa + ENTRY_64

    @property
    def occupied(self) -> tuple[int, int]:
        """The (start, end) GPAs of what the kernel takes until it reads its memory map."""
        runtime = self.gpa
        if self._fields["relocatable_kernel"]:
            align = self._fields["kernel_alignment"] or 1
            runtime = -(-runtime // align) * align
        return self.gpa, max(self.gpa + self.length, runtime + self._fields["init_size"])

    @property
    def initramfs_limit(self) -> int:
        """The GPA that the initramfs must end below, if it lies below 4 GiB."""
        return int(self._fields["initrd_addr_max"]) + 1

    @property
    def takes_high_initramfs(self) -> bool:
        """Whether it may also lie above 4 GiB."""
        return bool(self._fields["xloadflags"] & CAN_BE_LOADED_ABOVE_4G)

    @property
    def cmdline_max(self) -> int:
        """Bytes of command line that the kernel keeps, without the NUL."""
        return int(self._fields["cmdline_size"])

    def load(self, memory: "GuestMemory") -> None:
        """Put the protected-mode part into RAM. Raises ConfigError if the kernel has no room there."""
        start, end = self.occupied
        if not in_ram(memory, start, end - start):
            raise self.image.refuse(
                f"needs memory from {start:#x} to {end:#x}; the VM has {mib(memory.size)}, see --memory"
            )
        self.image.load(memory, self.gpa, self.offset, self.length)

    def _check_protocol(self) -> None:
        fields = self._fields
        if fields["boot_flag"] != BOOT_FLAG:
            raise self.image.refuse("is a damaged bzImage: its boot flag is not 0xaa55")
        if fields["version"] < VERSION_2_12:
            major, minor = divmod(fields["version"], 256)
            raise self.image.refuse(
                f"speaks boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) or later is needed"
            )
        if not fields["loadflags"] & LOADED_HIGH or not fields["xloadflags"] & KERNEL_64:
            raise self.image.refuse("is a bzImage without a 64-bit entry point: an x86-64 kernel is needed")

    def _check_part(self) -> None:
        if self.length <= ENTRY_64:
            raise self.image.refuse("is a damaged bzImage: it has no protected-mode part")
        self.image.check_holds(self.offset, self.length)
        start, end = self.occupied
        if start < HIGH_RAM or end > IDENTITY_MAPPED:
            raise self.image.refuse(
                f"wants to run at {start:#x} to {end:#x}: 1 MiB to {mib(IDENTITY_MAPPED)} is allowed"
            )

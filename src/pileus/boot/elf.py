"""ELF kernels: a vmlinux, or firmware such as rust-hypervisor-firmware, at its physical addresses.

Source: System V ABI, "Object Files" (ELF header, Program Header, Note Section), and its AMD64 supplement;
Xen's public/elfnote.h for the PVH entry point.
"""

from struct import Struct

from pileus.arch.x86_64.layout import HIGH_RAM, IDENTITY_MAPPED
from pileus.boot.image import Image, in_ram, mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.boot.image import GuestMemory

HEADER = Struct("<16s HHI QQQ I HHHHHH")
PROGRAM_HEADER = Struct("<II QQQ QQQ")  # type, flags, offset, vaddr, paddr, filesz, memsz, align
NOTE = Struct("<III")  # name size, descriptor size, type
CLASS_64, DATA_LITTLE_ENDIAN = 2, 1
TYPE_EXEC, TYPE_DYN = 2, 3
MACHINE_X86_64 = 62
PT_LOAD, PT_NOTE = 1, 4
MAX_PROGRAM_HEADERS = 128  # a vmlinux has 5
MAX_NOTES = 64 << 10  # bytes of one PT_NOTE; a vmlinux has 500
PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
ZEROS = memoryview(bytes(64 << 10))


class Segment:
    """A PT_LOAD: ``file_size`` bytes of the file at ``offset`` go to ``gpa``, zeros up to ``size``."""

    __slots__ = ("file_size", "gpa", "offset", "size")

    def __init__(self, offset: int, gpa: int, file_size: int, size: int) -> None:
        self.offset = offset
        self.gpa = gpa
        self.file_size = file_size
        self.size = size

    def holds(self, gpa: int) -> bool:
        return self.gpa <= gpa < self.gpa + self.size


class Elf:
    """A 64-bit x86-64 ELF whose headers are sound: every segment is in the file and in no wrap-around.

    ``pvh_entry`` is the 32-bit entry point that a Xen note names, or None; only then is ``entry``, the
    64-bit one, sure to be usable. :class:`pileus.boot.bzimage.BzImage` has the same face.
    """

    initramfs_limit = 1 << 32  # an ELF does not say; below 4 GiB any Linux finds it
    cmdline_max = None  # nor does it say this
    takes_high_initramfs = False

    __slots__ = ("entry", "image", "pvh_entry", "segments")

    def __init__(self, image: Image, *, allow_pvh: bool = True) -> None:
        """Raises ConfigError for a file that is not such an ELF."""
        self.image = image
        self.segments: list[Segment] = []
        self.pvh_entry: int | None = None
        self.entry, table, count = _header(image)
        rows = image.read(table, count * PROGRAM_HEADER.size)
        for kind, _, offset, _, gpa, file_size, size, align in PROGRAM_HEADER.iter_unpack(rows):
            if kind == PT_LOAD and size:
                self.segments.append(_segment(image, offset, gpa, file_size, size))
            elif kind == PT_NOTE and allow_pvh and self.pvh_entry is None:
                self.pvh_entry = _pvh_entry(image, offset, min(file_size, MAX_NOTES), align)
        self._check_entry()

    @property
    def occupied(self) -> tuple[int, int]:
        """The (start, end) GPAs of what the kernel takes until it reads its memory map."""
        return min(each.gpa for each in self.segments), max(each.gpa + each.size for each in self.segments)

    @property
    def setup_header(self) -> bytes:
        """An ELF has none: see ``zero_page.made_up_header``."""
        return b""

    def load(self, memory: "GuestMemory") -> None:
        """Put the segments into RAM. Raises ConfigError if there is none where they belong."""
        for each in self.segments:
            if not in_ram(memory, each.gpa, each.size):
                raise self.image.refuse(
                    f"needs {mib(each.size)} of memory at {each.gpa:#x}, which is not RAM from 1 MiB on"
                    f" (the VM has {mib(memory.size)})"
                )
        for each in self.segments:  # all zeros before any data: no .bss wipes a neighbour
            _clear(memory, each.gpa + each.file_size, each.size - each.file_size)
        for each in self.segments:
            if each.file_size:
                self.image.load(memory, each.gpa, each.offset, each.file_size)

    def _check_entry(self) -> None:
        if not self.segments:
            raise self.image.refuse("has nothing to load: an ELF kernel has PT_LOAD segments")
        entry, limit = (self.entry, IDENTITY_MAPPED) if self.pvh_entry is None else (self.pvh_entry, 1 << 32)
        if not HIGH_RAM <= entry < limit:
            raise self.image.refuse(f"has its entry point at {entry:#x}, not at 1 MiB to {mib(limit)}")
        if not any(each.holds(entry) for each in self.segments):
            raise self.image.refuse(f"has its entry point outside its segments, at {entry:#x}")


def _header(image: Image) -> tuple[int, int, int]:
    """The entry point, and the offset and length of the program header table."""
    ident, kind, machine, _, entry, table, _, _, _, row_size, count, *_ = HEADER.unpack(
        image.read(0, HEADER.size)
    )
    if ident[4] != CLASS_64 or ident[5] != DATA_LITTLE_ENDIAN or machine != MACHINE_X86_64:
        raise image.refuse("is an ELF of another machine: it must be 64-bit little-endian x86-64")
    if kind not in (TYPE_EXEC, TYPE_DYN):
        raise image.refuse("is an ELF that is no program (an object file or a core dump), not a kernel")
    if row_size != PROGRAM_HEADER.size or not 0 < count <= MAX_PROGRAM_HEADERS:
        raise image.refuse(
            f"has {count} program headers of {row_size} bytes: 1 to {MAX_PROGRAM_HEADERS} of 56 are allowed"
        )
    return entry, table, count


def _segment(image: Image, offset: int, gpa: int, file_size: int, size: int) -> Segment:
    if file_size:
        image.check_holds(offset, file_size)
    if file_size > size or gpa + size > 1 << 64:
        raise image.refuse(f"has a damaged segment: {file_size} bytes for {size} at {gpa:#x}")
    if gpa < HIGH_RAM:
        raise image.refuse(f"has a segment at {gpa:#x}: kernels load at 1 MiB or above")
    return Segment(offset, gpa, file_size, size)


def _pvh_entry(image: Image, offset: int, size: int, align: int) -> int | None:
    """The entry point that a Xen note among ``size`` bytes of notes names, if one does."""
    notes = image.read(offset, size)
    step = 8 if align == 8 else 4
    at = 0
    while at + NOTE.size <= size:
        name_size, length, kind = NOTE.unpack_from(notes, at)
        name = at + NOTE.size
        data = _up(name + name_size, step)
        if kind == PHYS32_ENTRY and notes[name : name + name_size] == b"Xen\0" and data + length <= size:
            return int.from_bytes(notes[data : data + min(length, 8)], "little")
        at = _up(data + length, step)
    return None


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _clear(memory: "GuestMemory", gpa: int, size: int) -> None:
    for at in range(0, size, len(ZEROS)):
        length = min(len(ZEROS), size - at)
        memory.write(gpa + at, ZEROS[:length])

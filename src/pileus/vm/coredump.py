"""A core of the guest: an ELF file with its memory by physical addresses, and its vCPUs' registers.

The file has holes where the memory holds zeroes. Where a Linux guest has left its VMCOREINFO, the note by
which a debugger of kernels finds its way, that is among the notes.

Source: gABI, "ELF Header", "Program Header"; Linux, kernel/vmcore_info.c (update_vmcoreinfo_note)
"""

import os
from struct import Struct

from pileus.errors import ConfigError, HostError
from pileus.vm.core_notes import HEADER, Registers, note, notes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pileus.memory import GuestMemory
    from pileus.memory._space import Region

EHDR = Struct("<16sHHIQQQIHHHHHH")
PHDR = Struct("<IIQQQQQQ")
IDENT = b"\x7fELF\2\1\1"  # 64 bits, little-endian, version 1
ET_CORE, EM_X86_64 = 4, 62
PT_LOAD, PT_NOTE = 1, 4
READ_WRITE_EXECUTE = 7
MODE = 0o600  # all secrets of the guest are in it

PAGE = 4096
CHUNK = 1 << 20  # bytes looked at at once
PIECE = 64 << 10  # bytes that are written or left out as a whole
ZEROES = bytes(CHUNK)

VMCOREINFO = b"VMCOREINFO"
MARK = note(VMCOREINFO, 0, b"")[HEADER.size :]  # its name, as it lies in memory after the header
MAX_VMCOREINFO = PAGE  # bytes of its text
BEGINS = b"OSRELEASE="


class CoreDump:
    """Opens the new file ``path`` for a core of ``memory``. Raises ConfigError where there can be none.

    The guest may not run until ``write`` has returned; nothing but ``cancel`` is called meanwhile.
    """

    def __init__(self, path: str, memory: "GuestMemory", vcpus: list[Registers]) -> None:
        self.path = path
        self.size = memory.size  # bytes to look at
        self._memory = memory
        self._notes = notes(vcpus)
        self._vmcoreinfo = b""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        except OSError as error:
            allowed = f"{os.strerror(error.errno or 0)}; a new file that can be written is needed"
            raise ConfigError("destination_url", path, allowed) from error

    def write(self, advance: "Callable[[int], None]") -> None:
        """Write it all, calling ``advance(count)`` with the bytes of memory that were looked at since.

        Whatever is raised, also by ``advance``, leaves no file; HostError where the host has no room.
        """
        try:
            self._write(advance)
        except BaseException as error:
            os.unlink(self.path)
            if isinstance(error, OSError):
                raise HostError("write", self.path, error) from error
            raise
        finally:
            os.close(self._fd)

    def _write(self, advance: "Callable[[int], None]") -> None:
        regions = self._memory.regions
        notes_at = EHDR.size + (1 + len(regions)) * PHDR.size
        room = len(self._notes) + len(note(VMCOREINFO, 0, bytes(MAX_VMCOREINFO)))
        offset = start = _page_up(notes_at + room)
        places = []
        for gpa, region in regions:
            places.append((gpa, region.size, offset))
            self._write_region(gpa, region, offset, advance)
            offset += region.size
        os.ftruncate(self._fd, max(offset, start))
        told = self._notes + self._vmcoreinfo
        headers = [PHDR.pack(PT_NOTE, 0, notes_at, 0, 0, len(told), len(told), 4)]
        for gpa, size, at in places:  # gdb goes by the virtual address, and takes this for one
            headers.append(PHDR.pack(PT_LOAD, READ_WRITE_EXECUTE, at, gpa, gpa, size, size, PAGE))
        head = EHDR.pack(
            IDENT, ET_CORE, EM_X86_64, 1, 0, EHDR.size, 0, 0, EHDR.size, PHDR.size, len(headers), 0, 0, 0
        )
        _pwrite(self._fd, head + b"".join(headers) + told, 0)  # last: without it, this is no core yet

    def _write_region(
        self, gpa: int, region: "Region", offset: int, advance: "Callable[[int], None]"
    ) -> None:
        done = 0
        with memoryview(region) as view:
            for begin, end in _extents(region):
                advance(begin - done)
                for at in range(begin, end, CHUNK):
                    block = bytes(view[at : min(at + CHUNK, end)])
                    if block != ZEROES[: len(block)]:
                        self._look_for_vmcoreinfo(block, view, at)
                        _write_block(self._fd, block, offset + at)
                    advance(len(block))
                done = end
        advance(region.size - done)

    def _look_for_vmcoreinfo(self, block: bytes, view: memoryview, at: int) -> None:
        """It begins some page. A guest may put there what it wants, as into all its memory."""
        found = -1
        while not self._vmcoreinfo and (found := block.find(MARK, found + 1)) >= 0:
            start = found - HEADER.size
            if start < 0 or start % PAGE:
                continue
            _, size, _ = HEADER.unpack_from(block, start)
            begin = at + found + len(MARK)
            text = bytes(view[begin : begin + size]) if 0 < size <= MAX_VMCOREINFO else b""
            if text.startswith(BEGINS) and len(text) == size:
                self._vmcoreinfo = note(VMCOREINFO, 0, text)


def _write_block(fd: int, block: bytes, offset: int) -> None:
    """The pieces of ``block`` that hold more than zeroes."""
    if b"\0" * PIECE not in block:
        _pwrite(fd, block, offset)
        return
    for at in range(0, len(block), PIECE):
        piece = block[at : at + PIECE]
        if piece != ZEROES[: len(piece)]:
            _pwrite(fd, piece, offset + at)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count


def _extents(region: "Region") -> "Iterator[tuple[int, int]]":
    """The parts of ``region`` that may hold something: reading a file's holes would fill them."""
    if region.fd < 0:
        yield 0, region.size
        return
    at, last = region.offset, region.offset + region.size
    while at < last:
        try:
            begin = os.lseek(region.fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: there is no more
            return
        end = os.lseek(region.fd, begin, os.SEEK_HOLE)
        if begin >= last:
            return
        at = min(end, last)
        yield begin - region.offset, at - region.offset


def _page_up(offset: int) -> int:
    return -(-offset // PAGE) * PAGE

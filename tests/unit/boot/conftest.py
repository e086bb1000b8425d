"""A guest's memory in this process, and builders of tiny valid kernels."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from struct import pack, pack_into

import pytest

MIB, GIB = 1 << 20, 1 << 30
MAP_NORESERVE = 0x4000  # the mmap module has no name for it
BuildElf = Callable[..., bytes]
BuildBzImage = Callable[..., bytes]


class FakeMemory:
    """The twin of pileus.memory's guest memory: checked, and taken from the host only when touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranges = [(0, min(size, 3 * GIB))]
        if size > 3 * GIB:
            self.ranges.append((4 * GIB, size - 3 * GIB))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._maps = [mmap.mmap(-1, length, flags=flags) for _, length in self.ranges]

    def view(self, gpa: int, size: int) -> memoryview:
        for (base, length), region in zip(self.ranges, self._maps, strict=True):
            if base <= gpa and gpa + size <= base + length:
                return memoryview(region)[gpa - base : gpa - base + size]
        raise AssertionError(f"{gpa:#x}, {size:#x} bytes: outside RAM")

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def load_file(self, gpa: int, fd: int, offset: int, length: int) -> None:
        view = self.view(gpa, length)
        done = 0
        while done < length:
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                raise EOFError
            done += count


@pytest.fixture
def memory() -> FakeMemory:
    return FakeMemory(256 * MIB)


@pytest.fixture(scope="session")
def make_memory() -> Callable[[int], FakeMemory]:
    return FakeMemory


@pytest.fixture
def save(tmp_path: Path) -> Callable[[bytes], str]:
    """Store bytes as a file and return its path."""

    def _save(data: bytes) -> str:
        path = tmp_path / f"image{len(list(tmp_path.iterdir()))}"
        path.write_bytes(data)
        return str(path)

    return _save


def build_elf(
    segments: list[tuple[int, bytes, int]] | None = None,
    *,
    entry: int = 0x100000,
    pvh: int | None = None,
    **header: int,
) -> bytes:
    """An ELF with (GPA, data, size in memory) segments, and a Xen note if ``pvh`` is an address."""
    segments = [(0x100000, b"code", 0x3000)] if segments is None else segments
    note = b"" if pvh is None else pack("<III4sQ", 4, 8, 18, b"Xen\0", pvh)
    count = len(segments) + bool(note)
    fields = {"cls": 2, "data": 1, "kind": 2, "machine": 62, "row": 56, "count": count, "table": 64} | header
    offset = 64 + 56 * count
    rows, body = b"", b""
    for gpa, data, size in segments:
        rows += pack("<IIQQQQQQ", 1, 7, offset + len(body), gpa, gpa, len(data), size, 0x1000)
        body += data
    if note:
        rows += pack("<IIQQQQQQ", 4, 4, offset + len(body), 0, 0, len(note), len(note), 4)
        body += note
    ident = b"\x7fELF" + bytes([fields["cls"], fields["data"], 1, 0]) + bytes(8)
    start = pack("<16sHHIQQQI", ident, fields["kind"], fields["machine"], 1, entry, fields["table"], 0, 0)
    return start + pack("<HHHHHH", 64, fields["row"], fields["count"], 0, 0, 0) + rows + body


def build_bzimage(code: bytes = b"\x90" * 0x400, **fields: int) -> bytes:
    """A bzImage with one setup sector and ``code`` as its protected-mode part."""
    values = {
        "setup_sects": (0x1F1, "<B", 1),
        "syssize": (0x1F4, "<I", len(code) // 16),
        "boot_flag": (0x1FE, "<H", 0xAA55),
        "magic": (0x202, "<I", int.from_bytes(b"HdrS", "little")),
        "jump": (0x200, "<H", 0x6AEB),  # over a header that ends at 0x26c
        "version": (0x206, "<H", 0x20F),
        "loadflags": (0x211, "<B", 1),
        "code32_start": (0x214, "<I", 0x100000),
        "initrd_addr_max": (0x22C, "<I", 0x7FFFFFFF),
        "kernel_alignment": (0x230, "<I", 0x200000),
        "relocatable_kernel": (0x234, "<B", 1),
        "min_alignment": (0x235, "<B", 21),
        "xloadflags": (0x236, "<H", 0x3),
        "cmdline_size": (0x238, "<I", 2047),
        "pref_address": (0x258, "<Q", 0x1000000),
        "init_size": (0x260, "<I", 0x400000),
    }
    image = bytearray(1024)
    for name, (offset, form, value) in values.items():
        pack_into(form, image, offset, fields.get(name, value))
    return bytes(image) + code


@pytest.fixture(scope="session")
def make_elf() -> BuildElf:
    return build_elf


@pytest.fixture(scope="session")
def make_bzimage() -> BuildBzImage:
    return build_bzimage

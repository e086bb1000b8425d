"""Cores: the ELF file, its holes, its notes, and what is left of one that fails."""

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.errors import ConfigError, HostError
from pileus.memory import GuestMemory
from pileus.memory._space import Region
from pileus.testing.memory import make_memory
from pileus.vm import coredump as module
from pileus.vm.core_notes import GENERAL, SEGMENTS, Registers, note
from pileus.vm.coredump import CoreDump

MIB = 1 << 20
RANGES = [(0, 4 * MIB), (1 << 32, 2 * MIB)]
SEGMENT = {
    "base": 0x1000, "limit": 0xFFFFF, "selector": 0x10, "type": 0xB, "present": 1, "dpl": 3, "db": 0, "s": 1,
    "l": 1, "g": 1, "avl": 0, "unusable": 0,
}  # fmt: skip
TABLE = {"base": 0xFE00, "limit": 0x7F}
VMCOREINFO = b"OSRELEASE=6.12.0\nPAGESIZE=4096\n"


def vcpu(number: int) -> Registers:
    sregs: dict[str, Any] = {name: SEGMENT | {"selector": 8 * index} for index, name in enumerate(SEGMENTS)}
    sregs |= {"gdt": TABLE, "idt": TABLE, "cr0": 1, "cr2": 2, "cr3": 3, "cr4": 4}
    return Registers({name: 100 * number + index for index, name in enumerate(GENERAL)}, sregs, 77)


@pytest.fixture(params=[False, True], ids=["private", "memfd"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    with make_memory(RANGES, shared=request.param) as memory:
        yield memory


def write(path: Path, memory: GuestMemory, vcpus: int = 1) -> int:
    """Write a core; returns the sum of the progress."""
    seen: list[int] = []
    dump = CoreDump(str(path), memory, [vcpu(index) for index in range(vcpus)])
    dump.write(seen.append)
    assert dump.size == memory.size
    assert min(seen) >= 0
    return sum(seen)


class Core:
    """The file, read by the book."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        ident, kind, machine = struct.unpack_from("<16sHH", self.data)
        assert ident[:7] == b"\x7fELF\2\1\1"
        assert (kind, machine) == (4, 62)
        (at,) = struct.unpack_from("<Q", self.data, 32)
        size, count = struct.unpack_from("<HH", self.data, 54)
        headers = [struct.unpack_from("<IIQQQQQQ", self.data, at + size * index) for index in range(count)]
        self.loads = [header for header in headers if header[0] == 1]
        (self.note,) = [header for header in headers if header[0] == 4]

    def memory(self, gpa: int, size: int) -> bytes:
        for _, _, offset, _, base, length, _, _ in self.loads:
            if base <= gpa < base + length:
                return self.data[offset + gpa - base :][:size]
        raise KeyError(gpa)

    @property
    def notes(self) -> list[tuple[bytes, int, bytes]]:
        found, at, end = [], self.note[2], self.note[2] + self.note[5]
        while at < end:
            name_size, size, kind = struct.unpack_from("<III", self.data, at)
            name = self.data[at + 12 : at + 12 + name_size]
            begin = at + 12 + (name_size + 3 & ~3)
            found.append((name.rstrip(b"\0"), kind, self.data[begin : begin + size]))
            at = begin + (size + 3 & ~3)
        assert at == end
        return found


def test_the_memory_is_where_the_guest_has_it(memory: GuestMemory, tmp_path: Path) -> None:
    places = {0: b"first", 3 * MIB - 3: b"across", 4 * MIB - 4: b"last", 1 << 32: b"high"}
    for gpa, text in places.items():
        memory.write(gpa, text)
    assert write(tmp_path / "core", memory) == memory.size
    core = Core(tmp_path / "core")
    assert [(load[4], load[5]) for load in core.loads] == RANGES
    for gpa, size in RANGES:
        assert core.memory(gpa, size) == bytes(memory.view(gpa, size))
    assert (tmp_path / "core").stat().st_mode & 0o777 == 0o600


def test_zeroes_take_no_room(memory: GuestMemory, tmp_path: Path) -> None:
    memory.write(MIB, b"x")
    write(tmp_path / "core", memory)
    status = (tmp_path / "core").stat()
    assert status.st_size > memory.size
    assert status.st_blocks * 512 < 256 << 10


def test_looking_at_a_file_does_not_fill_its_holes(tmp_path: Path) -> None:
    with make_memory(RANGES, shared=True) as memory:
        memory.write(MIB, b"x")
        held = [os.fstat(region.fd).st_blocks for _, region in memory.regions]
        write(tmp_path / "core", memory)
        assert [os.fstat(region.fd).st_blocks for _, region in memory.regions] == held


def test_memory_in_one_file_of_the_user_is_told_apart(tmp_path: Path) -> None:
    """The second region begins in the middle of the file."""
    regions = []
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", 6 * MIB)
    for gpa, size, offset in ((0, 4 * MIB, 0), (1 << 32, 2 * MIB, 4 * MIB)):
        regions.append((gpa, Region(os.open(tmp_path / "ram", os.O_RDWR), size, offset)))
    with GuestMemory(regions) as memory:
        memory.write(2 * MIB, b"low")
        memory.write((1 << 32) + MIB, b"high")
        assert write(tmp_path / "core", memory) == memory.size
    core = Core(tmp_path / "core")
    assert core.memory(2 * MIB, 4) == b"low\0"
    assert core.memory((1 << 32) + MIB, 5) == b"high\0"
    assert not any(core.memory(0, 2 * MIB))


def test_each_vcpu_has_its_notes(memory: GuestMemory, tmp_path: Path) -> None:
    write(tmp_path / "core", memory, vcpus=3)
    notes = Core(tmp_path / "core").notes
    assert [(name, kind) for name, kind, _ in notes] == [(b"CORE", 1)] * 3 + [(b"QEMU", 0)] * 3
    plain, state = notes[1][2], notes[4][2]
    assert len(plain) == 336
    assert struct.unpack_from("<I", plain, 32) == (2,), "threads count from 1"
    user = struct.unpack_from("<27Q", plain, 112)
    assert user[16] == 100 + GENERAL.index("rip")
    assert user[18] == 100 + GENERAL.index("rflags")
    assert user[19] == 100 + GENERAL.index("rsp")
    assert user[17] == 8 * SEGMENTS.index("cs")
    assert user[21] == 0x1000
    assert len(state) == 440
    assert struct.unpack_from("<II", state) == (1, 440)
    assert struct.unpack_from("<18Q", state, 8) == tuple(range(100, 118))
    assert struct.unpack_from("<IIIIQ", state, 152) == (0, 0xFFFFF, 0xA0FB00, 0, 0x1000)
    assert struct.unpack_from("<IIIIQ", state, 152 + 8 * 24) == (0, 0x7F, 0, 0, 0xFE00)
    assert struct.unpack_from("<6Q", state, 392) == (1, 0, 2, 3, 4, 77)


@pytest.mark.parametrize("gpa", [0, 2 * MIB, (1 << 32) + MIB - 4096], ids=hex)
def test_what_linux_tells_debuggers_is_found(memory: GuestMemory, tmp_path: Path, gpa: int) -> None:
    memory.write(gpa, note(b"VMCOREINFO", 0, VMCOREINFO))
    write(tmp_path / "core", memory)
    assert Core(tmp_path / "core").notes[-1] == (b"VMCOREINFO", 0, VMCOREINFO)


LIES = {
    "too long": (0, struct.pack("<III", 11, 5000, 0) + b"VMCOREINFO\0\0" + VMCOREINFO),
    "past the end": (6 * MIB, struct.pack("<III", 11, 4096, 0) + b"VMCOREINFO\0\0" + VMCOREINFO),
    "empty": (0, struct.pack("<III", 11, 0, 0) + b"VMCOREINFO\0\0"),
    "in the middle of a page": (16, note(b"VMCOREINFO", 0, VMCOREINFO)),
    "something else": (0, note(b"VMCOREINFO", 0, b"hello")),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_only_looks_like_it_is_left_out(memory: GuestMemory, tmp_path: Path, lie: str) -> None:
    gpa, data = LIES[lie]
    at = gpa if gpa < 4 * MIB else (1 << 32) + 2 * MIB - 4096
    memory.write(at, data)
    write(tmp_path / "core", memory)
    assert all(name != b"VMCOREINFO" for name, _, _ in Core(tmp_path / "core").notes)


def test_a_file_that_exists_is_left_alone(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "core").write_text("mine")
    with pytest.raises(ConfigError, match=f"destination_url {tmp_path}/core: File exists; a new file"):
        CoreDump(str(tmp_path / "core"), memory, [])
    assert (tmp_path / "core").read_text() == "mine"


def test_one_that_is_given_up_leaves_no_file(memory: GuestMemory, tmp_path: Path) -> None:
    def give_up(_: int) -> None:
        raise ZeroDivisionError

    before = os.listdir("/proc/self/fd")
    with pytest.raises(ZeroDivisionError):
        CoreDump(str(tmp_path / "core"), memory, []).write(give_up)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_host_without_room_is_told(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "pwrite")

    monkeypatch.setattr(module, "_pwrite", full)
    memory.write(0, b"x")
    with pytest.raises(HostError, match=f"cannot write {tmp_path}/core: No space left"):
        CoreDump(str(tmp_path / "core"), memory, []).write(lambda _: None)
    assert list(tmp_path.iterdir()) == []

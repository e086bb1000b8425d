import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from struct import pack, unpack_from
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pileus.boot import loader
from pileus.errors import ConfigError, HostError
from pileus.memory import GuestMemory, Region

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Save = Callable[[bytes], str]
Build = Callable[..., bytes]


def test_a_bzimage_starts_by_the_64_bit_linux_protocol(memory: Any, save: Save, make_bzimage: Build) -> None:
    image = make_bzimage()
    entry = loader.load(memory, save(image), "console=ttyS0", save(b"initramfs"))
    assert (entry.protocol, entry.rip, entry.rsi, entry.rbx) == ("linux64", 0x1000200, 0x7000, 0)
    page = memory.read(0x7000, 4096)
    assert page[0x202:0x210] == image[0x202:0x210]
    assert unpack_from("<II", page, 0x218) == (255 * MIB + 1020 * KIB, 9)
    assert memory.read(256 * MIB - 4096, 9) == b"initramfs"
    assert memory.read(0x20000, 14) == b"console=ttyS0\0"


def test_an_elf_starts_by_the_64_bit_linux_protocol(memory: Any, save: Save, make_elf: Build) -> None:
    entry = loader.load(memory, save(make_elf()))
    assert (entry.protocol, entry.rip, entry.rsi, entry.rbx) == ("linux64", MIB, 0x7000, 0)
    assert memory.read(0x7202, 4) == b"HdrS"
    assert memory.read(0x20000, 1) == b"\0"


def test_an_elf_with_a_xen_note_starts_by_pvh(memory: Any, save: Save, make_elf: Build) -> None:
    entry = loader.load(memory, save(make_elf(pvh=MIB + 2)), "quiet", save(b"initramfs"))
    assert (entry.protocol, entry.rip, entry.rsi, entry.rbx) == ("pvh", MIB + 2, 0, 0x6000)
    assert unpack_from("<I", memory.read(0x6000, 4)) == (0x336EC578,)


def test_pvh_can_be_declined(memory: Any, save: Save, make_elf: Build) -> None:
    entry = loader.load(memory, save(make_elf(pvh=MIB + 2)), allow_pvh=False)
    assert repr(entry) == "Entry('linux64', 0x100000, rsi=0x7000, rbx=0x0)"


def test_without_acpi_there_is_no_rsdp(memory: Any, save: Save, make_elf: Build) -> None:
    loader.load(memory, save(make_elf()), rsdp=0)
    assert memory.read(0x7070, 8) == bytes(8)


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08", b"#!/bin/sh\n", b"\x7fEL", b"M"], ids=ascii)
@pytest.mark.parametrize("length", [0, 5000])
def test_other_files_are_not_kernels(memory: Any, save: Save, start: bytes, length: int) -> None:
    with pytest.raises(ConfigError, match=r"^--kernel .*: is not a kernel: an ELF vmlinux or a bzImage"):
        loader.load(memory, save(start + bytes(length)))


def test_a_command_line_is_checked_against_the_kernel(memory: Any, save: Save, make_bzimage: Build) -> None:
    with pytest.raises(ConfigError, match="at most 100"):
        loader.load(memory, save(make_bzimage(cmdline_size=100)), "a" * 101)


def test_no_file_stays_open(memory: Any, save: Save, make_elf: Build) -> None:
    before = len(os.listdir("/proc/self/fd"))
    loader.load(memory, save(make_elf()), "", save(b"initramfs"))
    with pytest.raises(ConfigError):
        loader.load(memory, save(make_elf()), "", save(b""))
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_do_not_pass_through_python_objects(
    memory: Any, tmp_path: Path, save: Save, make_bzimage: Build, make_elf: Build
) -> None:
    initramfs = tmp_path / "initramfs"
    initramfs.touch()
    os.truncate(initramfs, 64 * MIB)
    kernels = [
        save(make_bzimage(bytes(16 * MIB), init_size=64 * MIB)),
        save(make_elf([(MIB, bytes(16 * MIB), 64 * MIB)])),
    ]
    tracemalloc.start()
    try:
        for kernel in kernels:
            loader.load(memory, kernel, "", str(initramfs))
        assert tracemalloc.get_traced_memory()[1] < 512 * KIB
    finally:
        tracemalloc.stop()


def test_loads_to_real_guest_memory(save: Save, make_elf: Build) -> None:
    fd = os.memfd_create("ram")
    os.truncate(fd, 64 * MIB)
    with GuestMemory([(0, Region(fd, 64 * MIB))]) as memory:
        memory.write(MIB, b"\xff" * 4096)
        loader.load(memory, save(make_elf([(MIB, b"code", 2000)])), "quiet", save(b"initramfs"))
        assert memory.read(MIB, 2001) == b"code" + bytes(1996) + b"\xff"
        assert memory.read(64 * MIB - 4096, 9) == b"initramfs"
        assert memory.read(0x20000, 6) == b"quiet\0"


# Whatever the file holds: it boots, or it is refused by name. FakeMemory asserts that nothing goes
# outside RAM, and any other exception fails the test.

VALUES = st.sampled_from(
    [0, 1, 4, 8, 63, 64, 255, 4095, MIB, 4 * MIB, GIB, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 0x2A0), st.sampled_from([1, 2, 4, 8]), VALUES | st.integers(0, 2**64 - 1)),
    max_size=5,
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(image: bytes, changes: list[tuple[int, int, int]], keep: int | None) -> bytes:
    data = bytearray(image)
    for offset, width, value in changes:
        if offset + width <= len(data):
            data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(data[:keep])


def boots_or_is_refused(memory: Any, kernel: bytes) -> None:
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, kernel)
        entry = loader.load(memory, f"/proc/self/fd/{fd}", "quiet")
        assert MIB <= entry.rip < GIB
    except (ConfigError, HostError):
        pass
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def small_memory(make_memory: Any) -> Any:
    return make_memory(8 * MIB)


@FUZZ
@given(changes=CHANGES, keep=st.none() | st.integers(0, 300), pvh=st.booleans())
def test_a_damaged_elf_boots_or_is_refused(
    small_memory: Any, make_elf: Build, changes: list[tuple[int, int, int]], keep: int | None, pvh: bool
) -> None:
    image = make_elf([(MIB, b"code", 0x3000), (2 * MIB, b"data", 4)], pvh=MIB + 1 if pvh else None)
    boots_or_is_refused(small_memory, mutated(image, changes, keep))


@FUZZ
@given(changes=CHANGES, keep=st.none() | st.integers(0, 2048))
def test_a_damaged_bzimage_boots_or_is_refused(
    small_memory: Any, make_bzimage: Build, changes: list[tuple[int, int, int]], keep: int | None
) -> None:
    image = make_bzimage(pref_address=2 * MIB)
    boots_or_is_refused(small_memory, mutated(image, changes, keep))


@FUZZ
@given(notes=st.binary(max_size=100), sizes=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_any_notes_boot_or_are_refused(
    small_memory: Any, make_elf: Build, notes: bytes, sizes: tuple[int, int]
) -> None:
    image = make_elf(pvh=MIB)
    note = pack("<III4s", *sizes, 18, b"Xen\0")
    boots_or_is_refused(small_memory, image[:-24] + (note + notes)[:24])


@FUZZ
@given(start=st.sampled_from([b"", b"\x7fELF", b"\x7fELF\2\1", bytes(0x202) + b"HdrS"]), rest=st.binary())
def test_any_bytes_boot_or_are_refused(small_memory: Any, start: bytes, rest: bytes) -> None:
    boots_or_is_refused(small_memory, start + rest + bytes(700))

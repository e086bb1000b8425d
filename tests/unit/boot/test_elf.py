from collections.abc import Callable
from struct import pack, pack_into
from typing import Any

import pytest

from pileus.boot.elf import Elf
from pileus.boot.image import Image
from pileus.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30
Save = Callable[[bytes], str]
Build = Callable[..., bytes]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "32-bit": ({"cls": 1}, "another machine"),
    "big endian": ({"data": 2}, "another machine"),
    "arm64": ({"machine": 183}, "another machine"),
    "object file": ({"kind": 1}, "no program"),
    "core dump": ({"kind": 4}, "no program"),
    "no program headers": ({"count": 0}, "0 program headers"),
    "too many program headers": ({"count": 0xFFFF}, "65535 program headers"),
    "program headers of another size": ({"row": 32}, "of 32 bytes"),
    "program headers past the end": ({"table": 1 << 40}, "truncated"),
    "no segments": ({"segments": [], "pvh": MIB}, "nothing to load"),
    "only empty segments": ({"segments": [(MIB, b"", 0)]}, "nothing to load"),
    "segment below 1 MiB": ({"segments": [(MIB - 1, b"code", 4 * MIB)]}, "1 MiB or above"),
    "segment around 2^64": ({"segments": [((1 << 64) - 4096, b"code", 8192)]}, "damaged segment"),
    "more data than room": ({"segments": [(MIB, b"code", 3)]}, "damaged segment"),
    "entry below 1 MiB": ({"entry": 0x1000}, "entry point at 0x1000"),
    "entry of a virtual address": ({"entry": 0xFFFFFFFF81000000}, "entry point at"),
    "entry outside the segments": ({"entry": 2 * MIB}, "outside its segments"),
    "entry at a segment's end": ({"entry": MIB + 0x3000}, "outside its segments"),
    "pvh entry outside the segments": ({"pvh": 5 * MIB}, "outside its segments"),
    "pvh entry above 4 GiB": ({"pvh": 5 * GIB}, "entry point at"),
}


def loaded(memory: Any, path: str) -> Elf:
    with Image("--kernel", path) as image:
        elf = Elf(image)
        elf.load(memory)
        return elf


def test_segments_go_to_their_physical_addresses(memory: Any, save: Save, make_elf: Build) -> None:
    image = make_elf([(MIB, b"first", 5), (3 * MIB + 7, b"second", 6)])
    assert loaded(memory, save(image)).entry == MIB
    assert memory.read(MIB, 6) == b"first\0"
    assert memory.read(3 * MIB + 6, 8) == b"\0second\0"


def test_bss_is_cleared_and_nothing_else(memory: Any, save: Save, make_elf: Build) -> None:
    size = 200_000  # more than one piece of zeros, and no multiple of it
    memory.write(MIB, b"\xff" * (size + 8))
    loaded(memory, save(make_elf([(MIB, b"data", size)])))
    assert memory.read(MIB, size + 8) == b"data" + bytes(size - 4) + b"\xff" * 8


def test_bss_does_not_wipe_the_data_of_another_segment(memory: Any, save: Save, make_elf: Build) -> None:
    loaded(memory, save(make_elf([(MIB + 16, b"data", 4), (MIB, b"code", 64)])))
    assert memory.read(MIB, 32) == b"code" + bytes(12) + b"data" + bytes(12)


def test_a_segment_may_be_all_bss_with_any_offset(memory: Any, save: Save, make_elf: Build) -> None:
    image = bytearray(make_elf([(MIB, b"code", 4), (2 * MIB, b"", 4096)]))
    pack_into("<Q", image, 64 + 56 + 8, 1 << 50)
    memory.write(2 * MIB, b"\xff")
    assert loaded(memory, save(bytes(image))).occupied == (MIB, 2 * MIB + 4096)
    assert memory.read(2 * MIB, 1) == b"\0"


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_refuses(save: Save, make_elf: Build, change: dict[str, Any], why: str) -> None:
    with Image("--kernel", save(make_elf(**change))) as image, pytest.raises(ConfigError, match=why):
        Elf(image)


@pytest.mark.parametrize("gpa", [255 * MIB + 1, 3 * GIB - 1, 3 * GIB, 4 * GIB - 1], ids=hex)
def test_refuses_segments_outside_ram(memory: Any, save: Save, make_elf: Build, gpa: int) -> None:
    image = make_elf([(MIB, b"code", 4), (gpa, b"data", MIB)])
    with pytest.raises(ConfigError, match="not RAM"):
        loaded(memory, save(image))


def test_segments_may_lie_above_4_gib(make_memory: Any, save: Save, make_elf: Build) -> None:
    memory = make_memory(5 * GIB)
    loaded(memory, save(make_elf([(MIB, b"code", 4), (5 * GIB, b"high", 4)])))
    assert memory.read(5 * GIB, 4) == b"high"
    with pytest.raises(ConfigError, match="not RAM"):
        loaded(memory, save(make_elf([(MIB, b"code", 4), (3 * GIB - 4, b"hole", 8)])))


def test_every_truncation_is_refused(memory: Any, save: Save, make_elf: Build) -> None:
    image = make_elf(pvh=MIB)
    for length in range(4, len(image)):
        with pytest.raises(ConfigError, match="truncated"):
            loaded(memory, save(image[:length]))


def test_finds_the_pvh_entry(save: Save, make_elf: Build) -> None:
    with Image("--kernel", save(make_elf(pvh=MIB + 0x20, entry=0xFFFFFFFF80000000))) as image:
        assert Elf(image).pvh_entry == MIB + 0x20


def test_without_pvh_the_64_bit_entry_counts(save: Save, make_elf: Build) -> None:
    with Image("--kernel", save(make_elf(pvh=MIB + 0x20))) as image:
        elf = Elf(image, allow_pvh=False)
        assert (elf.entry, elf.pvh_entry) == (MIB, None)


OTHER_NOTE = pack("<III4s4s", 4, 3, 18, b"GNU\0", b"abc\0")
NOTES = {
    "a four-byte address": (4, pack("<III4sI", 4, 4, 18, b"Xen\0", MIB + 1)),
    "behind other notes": (4, OTHER_NOTE + pack("<III4sQ", 4, 8, 18, b"Xen\0", MIB + 1)),
    "aligned to eight": (
        8,
        pack("<III4sI4x", 4, 4, 1, b"Foo\0", 0) + pack("<III4sI4x", 4, 4, 18, b"Xen\0", MIB + 1),
    ),
}
NOT_NOTES = {
    "none": b"",
    "only others": OTHER_NOTE,
    "another Xen note": pack("<III4sQ", 4, 8, 17, b"Xen\0", MIB),
    "cut off": pack("<III4s", 4, 8, 18, b"Xen\0"),
    "huge sizes": pack("<III4s", 0xFFFFFFFF, 0xFFFFFFFF, 18, b"Xen\0"),
    "too short": b"\4\0\0",
}


def with_notes(image: bytes, notes: bytes, align: int) -> bytes:
    """``image``, built with a note, with other ones at its end in their place."""
    data = bytearray(image)
    pack_into("<IIQQQQQQ", data, 64 + 56, 4, 4, len(image), 0, 0, len(notes), len(notes), align)
    return bytes(data) + notes


@pytest.mark.parametrize(("align", "notes"), NOTES.values(), ids=NOTES)
def test_finds_the_pvh_entry_in_a_note(save: Save, make_elf: Build, align: int, notes: bytes) -> None:
    with Image("--kernel", save(with_notes(make_elf(pvh=1), notes, align))) as image:
        assert Elf(image).pvh_entry == MIB + 1


@pytest.mark.parametrize("notes", NOT_NOTES.values(), ids=NOT_NOTES)
def test_other_notes_name_no_pvh_entry(save: Save, make_elf: Build, notes: bytes) -> None:
    with Image("--kernel", save(with_notes(make_elf(pvh=1), notes, 4))) as image:
        assert Elf(image).pvh_entry is None

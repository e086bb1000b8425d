"""The zero page and the bzImage header against <asm/bootparam.h>: no offset is taken on trust."""

import subprocess
from pathlib import Path
from struct import calcsize, unpack_from

import pytest

from pileus.arch.x86_64.layout import PAGE_SIZE
from pileus.boot import bzimage, zero_page

MAP = [(0, 0xA0000, 1), (0x100000, 1 << 29, 1), (0xE8000000, 1 << 28, 2)]
IN_HEADER = set(bzimage.FIELDS) | {
    "header",
    "type_of_loader",
    "ramdisk_image",
    "ramdisk_size",
    "cmd_line_ptr",
}
CONSTANTS = {
    "SETUP_HEADER": "offsetof(struct boot_params, hdr)",
    "E820_TABLE": "offsetof(struct boot_params, e820_table)",
    "E820_MAX": "E820_MAX_ENTRIES_ZEROPAGE",
    "E820_ENTRY.size": "sizeof(struct boot_e820_entry)",
    "PAGE_SIZE": "sizeof(struct boot_params)",
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """What the compiler says: offset and size of each field, value and 0 of each expression."""
    fields = {
        name: f"hdr.{name}" if name in IN_HEADER else name for name in bzimage.FIELDS | zero_page.FIELDS
    }
    lines = [
        f'printf("{name} %zu %zu\\n", offsetof(struct boot_params, {field}),'
        f" sizeof(((struct boot_params *)0)->{field}));"
        for name, field in fields.items()
    ]
    lines += [f'printf("{name} %zu 0\\n", (size_t)({value}));' for name, value in CONSTANTS.items()]
    lines += [
        f'printf("{name} %zu 0\\n", (size_t){name});'
        for name in ("LOADED_HIGH", "XLF_KERNEL_64", "XLF_CAN_BE_LOADED_ABOVE_4G")
    ]
    return _run(tmp_path_factory.mktemp("c"), lines)


def _run(directory: Path, lines: list[str]) -> dict[str, tuple[int, int]]:
    includes = "#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\n"
    (directory / "t.c").write_text(includes + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n")
    subprocess.run(["gcc", "-o", directory / "t", directory / "t.c"], check=True)
    output = subprocess.run([directory / "t"], check=True, capture_output=True, text=True).stdout
    return {name: (int(first), int(second)) for name, first, second in map(str.split, output.splitlines())}


@pytest.mark.parametrize("fields", [zero_page.FIELDS, bzimage.FIELDS], ids=["zero page", "bzImage"])
def test_fields_are_where_the_kernel_has_them(
    header: dict[str, tuple[int, int]], fields: dict[str, tuple[int, str]]
) -> None:
    assert {name: (offset, calcsize(code)) for name, (offset, code) in fields.items()} == {
        name: header[name] for name in fields
    }


def test_constants_are_the_kernels(header: dict[str, tuple[int, int]]) -> None:
    assert header["SETUP_HEADER"][0] == zero_page.SETUP_HEADER == bzimage.HEADER
    assert header["E820_TABLE"][0] == zero_page.E820_TABLE
    assert header["E820_MAX"][0] == zero_page.E820_MAX
    assert header["E820_ENTRY.size"][0] == zero_page.E820_ENTRY.size
    assert header["PAGE_SIZE"][0] == PAGE_SIZE
    assert header["header"][0] == bzimage.MAGIC_OFFSET
    assert header["LOADED_HIGH"][0] == bzimage.LOADED_HIGH
    assert header["XLF_KERNEL_64"][0] == bzimage.KERNEL_64
    assert header["XLF_CAN_BE_LOADED_ABOVE_4G"][0] == bzimage.CAN_BE_LOADED_ABOVE_4G


def field(page: bytes, name: str) -> int:
    offset, code = zero_page.FIELDS[name]
    value: int = unpack_from(code, page, offset)[0]
    return value


def encode(setup_header: bytes = b"", initramfs: tuple[int, int] = (0, 0)) -> bytes:
    return zero_page.encode(
        setup_header, MAP, code=0x1000000, cmdline_size=12, initramfs=initramfs, rsdp=0xA0000
    )


def test_an_elf_gets_a_made_up_header() -> None:
    page = encode()
    assert page[0x202:0x206] == b"HdrS"
    assert field(page, "boot_flag") == 0xAA55
    assert field(page, "type_of_loader") == 0xFF
    assert field(page, "kernel_alignment") == 16 << 20
    assert field(page, "cmdline_size") == 12
    assert field(page, "cmd_line_ptr") == 0x20000
    assert field(page, "acpi_rsdp_addr") == 0xA0000
    assert field(page, "ramdisk_image") == field(page, "ramdisk_size") == 0


def test_a_bzimage_keeps_its_own_header() -> None:
    own = bytes(range(100, 100 + 0x7B))
    page = encode(own)
    changed = {"type_of_loader", "code32_start", "ramdisk_image", "ramdisk_size", "cmd_line_ptr"}
    expected = bytearray(own)
    for name in changed:
        offset, code = zero_page.FIELDS[name]
        start, end = offset - 0x1F1, offset - 0x1F1 + calcsize(code)
        expected[start:end] = page[offset : offset + calcsize(code)]
    assert page[0x1F1 : 0x1F1 + len(own)] == expected
    assert field(page, "code32_start") == 0x1000000


def test_the_sentinel_is_zero() -> None:
    assert encode()[0x1EF] == 0  # else Linux wipes what it takes for rubbish


def test_a_high_initramfs_is_split_in_halves() -> None:
    page = encode(initramfs=(0x1_2345_6000, 0x2_0000_0001))
    assert field(page, "ramdisk_image") == 0x2345_6000
    assert field(page, "ext_ramdisk_image") == 1
    assert field(page, "ramdisk_size") == 1
    assert field(page, "ext_ramdisk_size") == 2


def test_the_memory_map_follows() -> None:
    page = encode()
    count = field(page, "e820_entries")
    assert [unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(count)] == MAP


def test_a_long_memory_map_is_cut_to_what_fits() -> None:
    page = zero_page.encode(b"", MAP * 60, code=0, cmdline_size=1, initramfs=(0, 0), rsdp=0)
    assert len(page) == 4096
    assert field(page, "e820_entries") == 128

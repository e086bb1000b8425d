from collections.abc import Callable
from typing import Any

import pytest

from pileus.boot.bzimage import BzImage
from pileus.boot.image import Image
from pileus.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30
Save = Callable[[bytes], str]
Build = Callable[..., bytes]

REFUSED: dict[str, tuple[dict[str, int], str]] = {
    "no magic": ({"magic": 0}, "not a kernel"),
    "no boot flag": ({"boot_flag": 0}, "boot flag"),
    "an old protocol": ({"version": 0x20B}, r"protocol 2\.11; 2\.12"),
    "a zImage": ({"loadflags": 0}, "64-bit entry"),
    "a 32-bit kernel": ({"xloadflags": 0x2}, "64-bit entry"),
    "no code": ({"syssize": 0}, "no protected-mode part"),
    "less code than the entry point": ({"syssize": 0x20}, "no protected-mode part"),
    "more code than the file": ({"syssize": 0x41}, "truncated"),
    "more setup than the file": ({"setup_sects": 3}, "truncated"),
    "below 1 MiB": ({"pref_address": 0x90000}, "1 MiB to 1024 MiB"),
    "below 1 MiB by code32_start": ({"pref_address": 0, "code32_start": 0x1000}, "1 MiB to 1024 MiB"),
    "past the mapped GiB": ({"pref_address": GIB - MIB}, "1 MiB to 1024 MiB"),
    "a huge address": ({"pref_address": (1 << 64) - 1}, "1 MiB to 1024 MiB"),
    "a huge init_size": ({"init_size": 0xFFFFFFFF}, "1 MiB to 1024 MiB"),
    "a huge alignment": ({"kernel_alignment": 0xFFFFFFFF}, "1 MiB to 1024 MiB"),
}


def test_loads_the_protected_mode_part_where_it_wants_to_run(
    memory: Any, save: Save, make_bzimage: Build
) -> None:
    code = bytes(range(256)) * 4
    with Image("--kernel", save(make_bzimage(code) + b"signature")) as image:
        kernel = BzImage(image)
        kernel.load(memory)
    assert kernel.entry == 16 * MIB + 0x200
    assert memory.read(16 * MIB, 1026) == code + b"\0\0"


def test_without_a_preferred_address_code32_start_counts(save: Save, make_bzimage: Build) -> None:
    with Image("--kernel", save(make_bzimage(pref_address=0))) as image:
        kernel = BzImage(image)
    assert kernel.gpa == MIB
    assert kernel.occupied == (MIB, 6 * MIB)  # it moves to its alignment, 2 MiB, and needs 4 there


def test_a_kernel_that_does_not_move_takes_its_own_place(save: Save, make_bzimage: Build) -> None:
    path = save(make_bzimage(pref_address=0, relocatable_kernel=0, kernel_alignment=0))
    with Image("--kernel", path) as image:
        assert BzImage(image).occupied == (MIB, 5 * MIB)


def test_zero_setup_sectors_mean_four(save: Save, make_bzimage: Build) -> None:
    with Image("--kernel", save(make_bzimage(setup_sects=0) + bytes(3 * 512))) as image:
        assert BzImage(image).offset == 5 * 512


def test_the_setup_header_is_as_long_as_its_jump_says(save: Save, make_bzimage: Build) -> None:
    image = make_bzimage()
    with Image("--kernel", save(image)) as file:
        assert BzImage(file).setup_header == image[0x1F1:0x26C]
    with Image("--kernel", save(make_bzimage(jump=0xFFEB))) as file:
        assert len(BzImage(file).setup_header) == 0x290 - 0x1F1


def test_limits_come_from_the_header(save: Save, make_bzimage: Build) -> None:
    with Image("--kernel", save(make_bzimage(xloadflags=1))) as image:
        kernel = BzImage(image)
    assert kernel.initramfs_limit == 2 * GIB
    assert kernel.cmdline_max == 2047
    assert not kernel.takes_high_initramfs


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_refuses(save: Save, make_bzimage: Build, change: dict[str, int], why: str) -> None:
    with Image("--kernel", save(make_bzimage(**change))) as image, pytest.raises(ConfigError, match=why):
        BzImage(image)


def test_refuses_a_kernel_that_needs_more_memory_than_there_is(
    make_memory: Any, save: Save, make_bzimage: Build
) -> None:
    with Image("--kernel", save(make_bzimage())) as image:
        kernel = BzImage(image)
        kernel.load(make_memory(20 * MIB))
        with pytest.raises(ConfigError, match="the VM has 20 MiB"):
            kernel.load(make_memory(20 * MIB - 4096))


def test_every_truncation_is_refused(save: Save, make_bzimage: Build) -> None:
    image = make_bzimage()
    for length in range(1, len(image), 7):
        with Image("--kernel", save(image[:length])) as file, pytest.raises(ConfigError):
            BzImage(file)

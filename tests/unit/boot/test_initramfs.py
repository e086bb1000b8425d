from collections.abc import Callable
from typing import Any

import pytest

from pileus.boot import initramfs
from pileus.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30


class Kernel:
    """As much of a kernel as the placement looks at."""

    def __init__(self, end: int = 20 * MIB, limit: int = 2 * GIB, high: bool = False) -> None:
        self.occupied = (16 * MIB, end)
        self.initramfs_limit = limit
        self.takes_high_initramfs = high


PLACES: dict[str, tuple[int, int, Any, int | None]] = {
    "at the end of RAM": (256 * MIB, MIB, Kernel(), 255 * MIB),
    "on a page": (256 * MIB, MIB + 1, Kernel(), 255 * MIB - 4096),
    "below the kernel's limit": (4 * GIB, MIB, Kernel(), 2 * GIB - MIB),
    "below the hole": (8 * GIB, MIB, Kernel(limit=1 << 32), 3 * GIB - MIB),
    "right behind the kernel": (21 * MIB, MIB, Kernel(), 20 * MIB),
    "not over the kernel": (21 * MIB, MIB + 1, Kernel(), None),
    "not past RAM": (256 * MIB, 256 * MIB, Kernel(), None),
    "above 4 GiB if the kernel can": (9 * GIB, 3 * GIB, Kernel(high=True), 7 * GIB),
    "not above 4 GiB if it cannot": (9 * GIB, 3 * GIB, Kernel(), None),
    "not in high RAM that is too small": (4 * GIB, 3 * GIB, Kernel(high=True), None),
    "nowhere below a limit of 0": (256 * MIB, MIB, Kernel(limit=1), None),
}


@pytest.mark.parametrize(("ram", "size", "kernel", "gpa"), PLACES.values(), ids=PLACES)
def test_is_placed(make_memory: Any, ram: int, size: int, kernel: Any, gpa: int | None) -> None:
    assert initramfs.place(make_memory(ram), size, kernel) == gpa


def test_goes_from_the_file_to_memory(memory: Any, save: Callable[[bytes], str]) -> None:
    kernel: Any = Kernel()
    gpa, size = initramfs.load(memory, save(b"init" * 2000), kernel)
    assert (gpa, size) == (256 * MIB - 8192, 8000)
    assert memory.read(gpa, 8001) == b"init" * 2000 + b"\0"


def test_larger_than_memory_is_refused(make_memory: Any, save: Callable[[bytes], str]) -> None:
    kernel: Any = Kernel()
    with pytest.raises(ConfigError, match=r"^--initramfs .*: does not fit: its 1 MiB .*the VM has 20 MiB"):
        initramfs.load(make_memory(20 * MIB), save(bytes(MIB)), kernel)


def test_empty_is_refused(memory: Any, save: Callable[[bytes], str]) -> None:
    kernel: Any = Kernel()
    with pytest.raises(ConfigError, match=r"^--initramfs .*: is empty"):
        initramfs.load(memory, save(b""), kernel)

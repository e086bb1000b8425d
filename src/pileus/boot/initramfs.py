"""The initramfs: as high as the kernel allows, out of the way of all that the kernel does at first."""

from pileus.arch.x86_64.layout import PAGE_SIZE, RAM_64BIT
from pileus.boot.image import Image, mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.boot.bzimage import BzImage
    from pileus.boot.elf import Elf
    from pileus.boot.image import GuestMemory


def load(memory: "GuestMemory", path: str, kernel: "Elf | BzImage") -> tuple[int, int]:
    """Put the file into RAM and return its (GPA, bytes). Raises ConfigError if it has no room there."""
    with Image("--initramfs", path) as image:
        gpa = place(memory, image.size, kernel)
        if gpa is None:
            raise image.refuse(
                f"does not fit: its {mib(image.size)} must lie beside the kernel in memory it can reach"
                f" (the VM has {mib(memory.size)})"
            )
        image.load(memory, gpa, 0, image.size)
        return gpa, image.size


def place(memory: "GuestMemory", size: int, kernel: "Elf | BzImage") -> int | None:
    """The highest page-aligned GPA above the kernel and below its limit, else above 4 GiB; or None."""
    _, kernel_end = kernel.occupied
    for base, length in memory.ranges:
        limit = base + length
        if base < RAM_64BIT:
            limit = min(limit, kernel.initramfs_limit)
        elif not kernel.takes_high_initramfs:
            break
        gpa = (limit - size) & -PAGE_SIZE
        if gpa >= max(base, kernel_end):
            return gpa
    return None

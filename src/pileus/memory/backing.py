"""What guest memory is made of: memory of this process, a memfd, huge pages, or the user's file.

A memfd (or file) mapped shared can be handed to a backend process by its descriptor, so it is what ``shared``
asks for. Where nobody shares, private memory is better: hosts give it transparent huge pages as they come,
which a memfd gets only where the administrator changed shmem_enabled. Nothing is
reserved, so that a guest may be promised more than the host has. Huge pages are the exception: the host sets
them aside at once, because a guest that touches one that is missing dies by SIGBUS.
"""

import os
import stat

from pileus.config.units import format_size
from pileus.errors import ConfigError, HostError
from pileus.memory._space import GuestMemory, Region, page_size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.model import MemoryConfig

MIB = 1 << 20
PAGE_SIZE = 4096
MFD_HUGE_SHIFT = 26  # <linux/memfd.h>: the page size's binary logarithm goes above this bit


def allocate(config: "MemoryConfig", ranges: list[tuple[int, int]], shared: bool = False) -> GuestMemory:
    """RAM for ``ranges`` of (gpa, size) as ``config`` wants it. Raises ConfigError and HostError.

    ``shared`` makes it shareable although ``config`` does not ask for that.
    """
    regions: list[tuple[int, Region]] = []
    try:
        offset = 0
        for gpa, size in ranges:
            regions.append((gpa, _region(config, size, offset, shared)))
            offset += size
        for _, region in regions:
            _advise(config, region)
        return GuestMemory(regions)
    except BaseException:
        for _, region in regions:
            region.close()
        raise


def _region(config: "MemoryConfig", size: int, offset: int, shared: bool) -> Region:
    """``offset`` is where the region begins in RAM counted without holes, and so in a regular file."""
    if not (config.file or config.shared or shared or config.hugepages):
        return Region(-1, size)
    fd, offset = _open(config.file, offset) if config.file else (_memfd(config), 0)
    try:
        return _map(config, fd, size, offset)
    except BaseException:
        os.close(fd)
        raise


def _map(config: "MemoryConfig", fd: int, size: int, offset: int) -> Region:
    """``size`` bytes of ``fd`` from ``offset``, which it is grown to hold."""
    page_size = page_size_of(fd)
    wanted = format_size(config.size)
    if size % page_size:
        raise ConfigError(
            "--memory size", wanted, f"a multiple of {format_size(page_size)}, a page, is needed"
        )
    _grow(fd, offset + size, config.file or "a memfd for guest memory")
    if config.file is None:
        _seal(fd)
    huge = page_size > PAGE_SIZE
    try:
        return Region(fd, size, offset, reserve=huge, page_size=page_size)
    except HostError as error:
        if huge:
            raise ConfigError("--memory size", wanted, _too_few_huge_pages(page_size)) from error
        raise


def _grow(fd: int, size: int, what: str) -> None:
    """Make ``fd`` hold at least ``size`` bytes."""
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
    except OSError as error:
        raise HostError(f"grow to {size // MIB} MiB", what, error) from error


def _seal(fd: int) -> None:
    """No process that shares the memory can take a part of it away, which would end whoever touches it."""
    import fcntl  # here, since a start without shared memory does not need it

    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError:
        pass  # a kernel that seals no huge pages


def _memfd(config: "MemoryConfig") -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if config.hugepages:
        flags |= os.MFD_HUGETLB
        if config.hugepage_size:
            flags |= (config.hugepage_size.bit_length() - 1) << MFD_HUGE_SHIFT
    try:
        return os.memfd_create("pileus-ram", flags)
    except OSError as error:
        if config.hugepage_size:
            raise ConfigError(
                "--memory hugepage_size",
                format_size(config.hugepage_size),
                "this host has no huge pages of that size",
            ) from error
        raise HostError("make", "a memfd for guest memory", error) from error


def _open(path: str, offset: int) -> tuple[int, int]:
    """(fd, offset in it) of RAM kept in ``path``: in a file without a name where that is a directory."""
    allowed = "an existing directory (such as /dev/shm or a hugetlbfs mount) or a regular file is needed"
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), 0
        if stat.S_ISREG(mode):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC), offset
    except OSError as error:
        raise ConfigError("--memory file", path, f"{os.strerror(error.errno or 0)}; {allowed}") from error
    raise ConfigError("--memory file", path, allowed)


def _advise(config: "MemoryConfig", region: Region) -> None:
    if config.thp and region.page_size == PAGE_SIZE:
        try:
            region.advise_huge()
        except HostError:
            pass  # a kernel without transparent huge pages: a wish, not a need
    if config.mergeable:
        region.advise_mergeable()
    if config.prefault:
        region.prefault()


def _too_few_huge_pages(page_size: int) -> str:
    """Says how many huge pages the host has to give."""
    folder = f"/sys/kernel/mm/hugepages/hugepages-{page_size // 1024}kB"
    try:
        with open(f"{folder}/free_hugepages") as free, open(f"{folder}/resv_hugepages") as reserved:
            available = int(free.read()) - int(reserved.read())
    except (OSError, ValueError):
        return "the host has too few free huge pages"
    return (
        f"the host has {available} free huge pages of {page_size // 1024} KiB; see /proc/sys/vm/nr_hugepages"
    )

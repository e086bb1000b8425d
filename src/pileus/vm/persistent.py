"""Persistent memory: files of the host, mapped above the guest's RAM.

Each becomes a slot of KVM and memory that other devices can reach, so that a disk reads straight into it.
What tells the guest of it is a virtio-pmem device, or ACPI, as an NVDIMM.
"""

import os
import stat
from errno import EACCES, EIO, EPERM, EROFS

from pileus.arch.x86_64 import layout
from pileus.arch.x86_64.acpi.nfit import Nvdimm
from pileus.block.lock import lock
from pileus.config.units import format_size
from pileus.errors import ConfigError, HostError
from pileus.memory import Region
from pileus.memory._sigbus import Guard
from pileus.memory._space import page_size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.bus import Bus
    from pileus.cleanup import Cleanup
    from pileus.config.model import PmemConfig, VmConfig
    from pileus.kvm import Vm
    from pileus.memory import GuestMemory

MIB = 1 << 20
UNIT = 2 * MIB  # what guests map persistent memory in; by the rules of the configuration, too
READ_ONLY = (EACCES, EPERM, EROFS)
KINDS = "a regular file, a block device or a directory is needed"


class PersistentMemory:
    """``region`` at ``gpa``. ``nvdimm`` says what ACPI tells of it, None for a virtio-pmem device."""

    def __init__(
        self, name: str, path: str, region: Region, gpa: int, guard: Guard, nvdimm: Nvdimm | None = None
    ) -> None:
        self.name = name
        self.path = path
        self.gpa = gpa
        self.size = region.size
        self.nvdimm = nvdimm
        self._region = region
        self._guard = guard

    def sync(self) -> None:
        """Make durable what was stored before the call. Raises OSError where that is not so, on any thread.

        What is written to a private mapping lasts as long as the VM, which is all that was promised.
        """
        if self._region.private:
            return
        status = os.fstat(self._region.fd)
        if self._guard.lost or (stat.S_ISREG(status.st_mode) and status.st_size < self.size):
            raise OSError(EIO, f"{self.path} was cut short by another process")
        os.fdatasync(self._region.fd)


def add(
    config: "VmConfig", memory: "GuestMemory", vm: "Vm", mmio: "Bus", phys_bits: int, cleanup: "Cleanup"
) -> list[PersistentMemory]:
    """Open, lock and map each ``--pmem``; ``memory`` owns them then. Raises ConfigError and HostError."""
    added: list[PersistentMemory] = []
    sizes: list[int] = []
    for index, each in enumerate(config.pmem):
        region = open_region(each)
        try:
            sizes.append(region.size)
            ranges = layout.persistent_ranges(config.memory.size, sizes, phys_bits)
            if len(ranges) < len(sizes):
                allowed = f"the guest has {phys_bits} bits of physical addresses, too few for RAM and that"
                raise ConfigError("--pmem size", format_size(region.size), allowed)
            gpa = ranges[index][0]
            memory.attach(gpa, region)
        except BaseException:
            region.close()
            raise
        vm.set_memory(len(memory.regions) + index, gpa, region.size, region.hva)
        guard = cleanup.own(Guard(region.hva, region.size, region.page_size))
        added.append(PersistentMemory(each.id or f"_pmem{index}", each.file, region, gpa, guard))
        if each.nvdimm:
            added[-1].nvdimm = _nvdimm(added[-1], index, mmio, durable=not each.discard_writes)
    return added


def _nvdimm(memory: PersistentMemory, index: int, mmio: "Bus", *, durable: bool) -> Nvdimm:
    """What ACPI tells of it. Memory that is to be durable has an address to write to for that."""
    if not durable:
        return Nvdimm(index, memory.gpa, memory.size)
    from pileus.devices.flush_hint import FlushHint

    hint = layout.NVDIMM_FLUSH + index * layout.PAGE_SIZE
    mmio.insert(hint, layout.PAGE_SIZE, FlushHint(memory.name, memory.sync))
    return Nvdimm(index, memory.gpa, memory.size, hint)


def open_region(config: "PmemConfig") -> Region:
    """The file of ``config``, locked and mapped. Raises ConfigError and HostError."""
    fd = _open(config)
    try:
        _check_kind(fd, config.file)
        if not stat.S_ISDIR(os.stat(config.file).st_mode):
            lock(fd, config.file, readonly=config.discard_writes)
        size = _size(fd, config)
        page_size = page_size_of(fd)
        if size % page_size:
            allowed = f"a multiple of {format_size(page_size)}, a page there, is needed"
            raise ConfigError("--pmem size", format_size(size), allowed)
        return Region(fd, size, page_size=page_size, private=config.discard_writes)
    except BaseException:
        os.close(fd)
        raise


def _open(config: "PmemConfig") -> int:
    """A descriptor of the file, or of a new one without a name where it is a directory."""
    path = config.file
    try:
        if os.path.isdir(path):
            fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, config.size or 0)
            except BaseException:
                os.close(fd)
                raise
            return fd
        access = os.O_RDONLY if config.discard_writes else os.O_RDWR
        return os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not keep us waiting
    except OSError as error:
        if error.errno in READ_ONLY and not config.discard_writes:
            allowed = f"it cannot be written to ({error.strerror}); discard_writes=on does without"
            raise ConfigError("--pmem file", path, allowed) from error
        raise HostError("open", path, error) from error


def _check_kind(fd: int, path: str) -> None:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError("--pmem file", path, KINDS)


def _size(fd: int, config: "PmemConfig") -> int:
    """What is to be mapped, in bytes: what was asked for, if the file has that much, or all of the file."""
    there = os.lseek(fd, 0, os.SEEK_END)
    if config.size is None:
        if there == 0 or there % UNIT:
            allowed = f"it has {there} bytes, no multiple of {format_size(UNIT)}"
            if os.path.isdir(config.file):
                allowed = "in a directory a file is made, so size= is required"
            raise ConfigError("--pmem file", config.file, allowed)
        return there
    if config.size > there:
        allowed = f"{config.file} has {there} bytes; a file is mapped as it is and never grown"
        raise ConfigError("--pmem size", format_size(config.size), allowed)
    return config.size

"""A VFIO container: an address space of the host's IOMMU, where devices of the host see the guest's memory.

Source: <linux/vfio.h>; Documentation/driver-api/vfio.rst
"""

import fcntl
import os
from errno import ENOMEM
from struct import Struct

from pileus import log
from pileus.errors import ConfigError, HostError
from pileus.vfio import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pileus.memory import GuestMemory

    class Assigned(Protocol):
        """What is told of groups, such as a kvm.assigned.Assigned."""

        def add(self, fd: int) -> None: ...
        def remove(self, fd: int) -> None: ...


PATH = "/dev/vfio/vfio"
VFIO = 0x3B64  # _IO(';', 100), the first of the ioctls
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, GROUP_GET_STATUS, GROUP_SET_CONTAINER = range(VFIO, VFIO + 5)
GROUP_GET_DEVICE_FD = VFIO + 6
IOMMU_GET_INFO, IOMMU_MAP_DMA, IOMMU_UNMAP_DMA = range(VFIO + 12, VFIO + 15)
API_VERSION = 0
TYPE1, TYPE1V2 = 1, 3
STATUS = Struct("=II")  # argsz, flags
VIABLE = 1
DMA_MAP = Struct("=IIQQQ")  # argsz, flags, address here, iova, size
DMA_UNMAP = Struct("=IIQQ")  # argsz, flags, iova, size
IOMMU_INFO = Struct("=IIQII")  # argsz, flags, page sizes, where capabilities begin, padding
INFO_CAPS, IOVA_RANGES = 1 << 1, 1  # a flag; a capability: count, reserved, (first, last) each
MAX_INFO = 64 << 10  # bytes
COUNT = Struct("=II")  # ranges, reserved
ANYWHERE = (1 << 64) - 1


class Container:
    """Devices in it see nothing of ``memory``, which outlives it, until it is mapped, and thereby pinned.

    ``assigned`` is told of them, and outlives it, too. Raises HostError, ConfigError.
    """

    def __init__(self, memory: "GuestMemory", assigned: "Assigned | None" = None) -> None:
        self._memory = memory
        self._assigned = assigned
        self.last = ANYWHERE  # address that can be mapped, once a device is there
        self._groups: dict[str, int] = {}  # path -> descriptor
        self._fd = _open(PATH)
        try:
            if fcntl.ioctl(self._fd, GET_API_VERSION) != API_VERSION:
                raise HostError("use", PATH, "it speaks another version of VFIO")
        except BaseException:
            os.close(self._fd)
            raise

    def open_device(self, path: str, name: str) -> int:
        """A descriptor of the device ``name`` (DDDD:BB:SS.F), found at ``path``; the caller's."""
        group = self._group(path)
        try:
            fd: int = fcntl.ioctl(group, GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"))
        except OSError as error:
            raise HostError("take", path, error) from error
        return fd

    def open_all(self) -> None:
        """Let the devices see all memory, where the guest does."""
        for gpa, region in self._memory.regions:
            try:
                self._map(gpa, region.hva, region.size, abi.DMA_READ | abi.DMA_WRITE)
            except OSError as error:
                mib = region.size >> 20
                hint = (
                    ""
                    if error.errno != ENOMEM
                    else "; all of it is locked, which RLIMIT_MEMLOCK has to allow"
                )
                raise HostError("map", f"{mib} MiB of guest memory for DMA", f"{error}{hint}") from error
            log.debug(f"{region.size:#x} bytes at {gpa:#x} are open to the host's devices")

    def map(self, first: int, last: int, gpa: int, access: int) -> None:
        """Let [first, last] be what of the guest's memory is at ``gpa``; ``access`` is of abi.DMA_*.

        Raises OSError, with part of it mapped. What is no memory stays out of reach: registers of another
        device, say.
        """
        end = gpa + (last - first) + 1
        for start, region in self._memory.regions if access else ():
            low, high = max(gpa, start), min(end, start + region.size)
            if low < high:
                self._map(first + (low - gpa), region.hva + (low - start), high - low, access)

    def unmap(self, first: int, last: int) -> None:
        """Whatever was mapped in [first, last], none of it in part."""
        last = min(last, self.last, ANYWHERE - 1)
        if first > last:
            return
        try:
            fcntl.ioctl(
                self._fd,
                IOMMU_UNMAP_DMA,
                bytearray(DMA_UNMAP.pack(DMA_UNMAP.size, 0, first, last + 1 - first)),
            )
        except OSError as error:
            log.limited(log.ERROR, f"{first:#x} to {last:#x} stay open to the host's devices: {error}")

    def close(self) -> None:
        """After the devices."""
        while self._groups:
            fd = self._groups.popitem()[1]
            if self._assigned is not None:
                self._assigned.remove(fd)
            os.close(fd)
        os.close(self._fd)

    def _group(self, path: str) -> int:
        """The group of the device at ``path``, in this container."""
        try:
            number = os.path.basename(os.readlink(f"{path}/iommu_group"))
        except OSError as error:
            raise ConfigError("--device", path, "it is no PCI device behind an IOMMU of the host") from error
        where = f"/dev/vfio/{number}"
        if where not in self._groups:
            self._groups[where] = self._add_group(path, where)
        return self._groups[where]

    def _add_group(self, path: str, where: str) -> int:
        try:
            fd = _open(where)
        except HostError as error:
            allowed = f"{error}; bind it to vfio-pci first, and see who may open {where}"
            raise ConfigError("--device", path, allowed) from error
        try:
            status = bytearray(STATUS.pack(STATUS.size, 0))
            fcntl.ioctl(fd, GROUP_GET_STATUS, status)
            if not STATUS.unpack(status)[1] & VIABLE:
                allowed = f"the host still uses another device of its group, {where}"
                raise ConfigError("--device", path, allowed)
            fcntl.ioctl(fd, GROUP_SET_CONTAINER, self._fd.to_bytes(4, "little"))
            if not self._groups:
                self._set_iommu()
            if self._assigned is not None:
                self._assigned.add(fd)
            return fd
        except OSError as error:
            os.close(fd)
            raise HostError("use", where, error) from error
        except BaseException:
            os.close(fd)
            raise

    def _set_iommu(self) -> None:
        """With the first group. Raises OSError, HostError."""
        if not fcntl.ioctl(self._fd, CHECK_EXTENSION, TYPE1V2):
            raise HostError("use", PATH, "the host's IOMMU is not of VFIO's type 1, version 2")
        fcntl.ioctl(self._fd, SET_IOMMU, TYPE1V2)
        self.last = _last_iova(self._iommu_info())

    def _iommu_info(self) -> bytes:
        size = IOMMU_INFO.size
        while True:
            info = bytearray(IOMMU_INFO.pack(size, 0, 0, 0, 0)).ljust(size, b"\0")
            fcntl.ioctl(self._fd, IOMMU_GET_INFO, info)
            wanted = IOMMU_INFO.unpack_from(info)[0]
            if wanted <= size or wanted > MAX_INFO:
                return bytes(info)
            size = wanted

    def _map(self, iova: int, hva: int, size: int, access: int) -> None:
        fcntl.ioctl(self._fd, IOMMU_MAP_DMA, DMA_MAP.pack(DMA_MAP.size, access, hva, iova, size))


def _last_iova(info: bytes) -> int:
    """The end of what can be mapped, by the answer to IOMMU_GET_INFO."""
    _, flags, _, start, _ = IOMMU_INFO.unpack_from(info)
    while flags & INFO_CAPS and IOMMU_INFO.size <= start <= len(info) - abi.CAPABILITY.size - COUNT.size:
        kind, _, following = abi.CAPABILITY.unpack_from(info, start)
        start += abi.CAPABILITY.size
        if kind == IOVA_RANGES:
            count = COUNT.unpack_from(info, start)[0]
            ranges = info[start + COUNT.size :][: count * abi.AREA.size]
            lasts = [last for _, last in abi.AREA.iter_unpack(ranges[: len(ranges) & ~15])]
            return max(lasts, default=ANYWHERE)
        start = following
    return ANYWHERE


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError("open", path, error) from error

"""A VFIO container: an IOMMU's address space, where devices of the host see the guest's memory.

Source: <linux/vfio.h>; Documentation/driver-api/vfio.rst
"""

import fcntl
import os
from struct import Struct

from pileus import log
from pileus.errors import ConfigError, HostError
from pileus.vfio import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.memory import GuestMemory

PATH = "/dev/vfio/vfio"
VFIO = 0x3B64  # _IO(';', 100), the first of the ioctls
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, GROUP_GET_STATUS, GROUP_SET_CONTAINER = range(VFIO, VFIO + 5)
GROUP_GET_DEVICE_FD = VFIO + 6
IOMMU_MAP_DMA, IOMMU_UNMAP_DMA = VFIO + 13, VFIO + 14
API_VERSION = 0
TYPE1, TYPE1V2 = 1, 3
STATUS = Struct("=II")  # argsz, flags
VIABLE = 1
DMA_MAP = Struct("=IIQQQ")  # argsz, flags, address here, iova, size


class Container:
    """All of ``memory`` is mapped, and so pinned, once the first group is there; it outlives the container.

    Raises HostError, ConfigError.
    """

    def __init__(self, memory: "GuestMemory") -> None:
        self._memory = memory
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

    def close(self) -> None:
        """After the devices."""
        while self._groups:
            os.close(self._groups.popitem()[1])
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
            return fd
        except OSError as error:
            os.close(fd)
            raise HostError("use", where, error) from error
        except BaseException:
            os.close(fd)
            raise

    def _set_iommu(self) -> None:
        """With the first group. Raises OSError, HostError."""
        version2 = fcntl.ioctl(self._fd, CHECK_EXTENSION, TYPE1V2)
        fcntl.ioctl(self._fd, SET_IOMMU, TYPE1V2 if version2 else TYPE1)
        for gpa, region in self._memory.regions:
            request = DMA_MAP.pack(DMA_MAP.size, abi.DMA_READ | abi.DMA_WRITE, region.hva, gpa, region.size)
            try:
                fcntl.ioctl(self._fd, IOMMU_MAP_DMA, request)
            except OSError as error:
                mib = region.size >> 20
                hint = "" if error.errno != 12 else "; all of it is locked, which RLIMIT_MEMLOCK has to allow"
                raise HostError("map", f"{mib} MiB of guest memory for DMA", f"{error}{hint}") from error
            log.debug(f"{region.size:#x} bytes at {gpa:#x} are open to the host's devices")


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError("open", path, error) from error

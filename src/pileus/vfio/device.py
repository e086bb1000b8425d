"""A PCI device of the host, as a back-end: its registers are read and written through the kernel's vfio-pci.

Source: <linux/vfio.h>
"""

import fcntl
import os

from pileus import log
from pileus.errors import ConfigError, HostError, RemoteProtocolError
from pileus.memory import Region
from pileus.vfio import abi
from pileus.vfio.container import VFIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.vfio.container import Container

GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS, RESET = range(VFIO + 7, VFIO + 12)
MAX_REGION_INFO = 64 << 10  # bytes: far more than any region has capabilities
TRIGGER = abi.DATA_EVENTFD | abi.ACTION_TRIGGER
DISABLE = abi.DATA_NONE | abi.ACTION_TRIGGER


class HostDevice:
    """The device at ``path`` of sysfs, in ``container``, which outlives it. Raises ConfigError, HostError."""

    def __init__(self, container: "Container", path: str, name: str) -> None:
        self.name = name
        path = os.path.realpath(path)
        self._fd = container.open_device(path, os.path.basename(path))
        try:
            self._learn(path)
        except OSError as error:
            os.close(self._fd)
            raise HostError("use", path, error) from error
        except BaseException:
            os.close(self._fd)
            raise
        self.reset()

    def _learn(self, path: str) -> None:
        info = bytearray(abi.DEVICE_INFO.pack(abi.DEVICE_INFO.size, 0, 0, 0))
        fcntl.ioctl(self._fd, GET_INFO, info)
        _, flags, regions, irqs = abi.DEVICE_INFO.unpack(info)
        if not flags & abi.DEVICE_PCI or regions <= abi.CONFIG:
            raise ConfigError("--device", path, "it is no PCI device")
        self._resets = bool(flags & abi.DEVICE_RESET)
        self.regions = [self._region(index) for index in range(abi.REGIONS)]
        self.irqs = {kind: self._irqs(kind) for kind in range(min(irqs, abi.IRQS))}

    def _region(self, index: int) -> abi.RegionInfo:
        size = abi.REGION_INFO.size
        while True:
            info = bytearray(abi.REGION_INFO.pack(size, 0, index, 0, 0, 0)).ljust(size, b"\0")
            try:
                fcntl.ioctl(self._fd, GET_REGION_INFO, info)
            except OSError:
                return abi.RegionInfo(index)  # such as a VGA region, on what is no graphics card
            wanted = abi.REGION_INFO.unpack_from(info)[0]
            if wanted <= size or wanted > MAX_REGION_INFO:
                break
            size = wanted
        try:
            return abi.decode_region(index, bytes(info))
        except RemoteProtocolError as error:
            raise HostError("use", self.name, error) from error

    def _irqs(self, kind: int) -> int:
        info = bytearray(abi.IRQ_INFO.pack(abi.IRQ_INFO.size, 0, kind, 0))
        try:
            fcntl.ioctl(self._fd, GET_IRQ_INFO, info)
        except OSError:
            return 0
        count: int = abi.IRQ_INFO.unpack(info)[3]
        return min(count, abi.MAX_IRQS)

    def read(self, region: int, offset: int, size: int) -> int:
        try:
            data = os.pread(self._fd, size, self.regions[region].offset + offset)
        except OSError as error:
            log.limited(log.WARNING, f"{self.name}: region {region} is not read at {offset:#x}: {error}")
            data = b""
        return int.from_bytes(data, "little") if len(data) == size else (1 << (8 * size)) - 1

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        try:
            os.pwrite(self._fd, value.to_bytes(size, "little"), self.regions[region].offset + offset)
        except OSError as error:
            log.limited(log.WARNING, f"{self.name}: region {region} is not written at {offset:#x}: {error}")

    def map(self, region: int, offset: int, size: int) -> Region | None:
        copy = os.dup(self._fd)
        try:
            return Region(copy, size, self.regions[region].offset + offset)
        except HostError as error:
            os.close(copy)
            log.limited(log.WARNING, f"{self.name}: accesses to region {region} are slow: {error}")
            return None

    def set_eventfds(self, kind: int, fds: list[int]) -> None:
        flags = TRIGGER if fds else DISABLE
        self._set_irqs(kind, flags, len(fds), b"".join(fd.to_bytes(4, "little") for fd in fds))

    def unmask_by(self, fd: int) -> bool:
        return self._set_irqs(
            abi.INTX, abi.DATA_EVENTFD | abi.ACTION_UNMASK, 1, fd.to_bytes(4, "little"), log.DEBUG
        )

    def unmask(self) -> None:
        self._set_irqs(abi.INTX, abi.DATA_NONE | abi.ACTION_UNMASK, 1)

    def reset(self) -> None:
        """A device that knows no reset is reset by the kernel when it is opened, as far as that goes."""
        if not self._resets:
            return
        try:
            fcntl.ioctl(self._fd, RESET)
        except OSError as error:
            log.warning(f"{self.name}: it is not reset: {error}")

    def close(self) -> None:
        os.close(self._fd)

    def _set_irqs(self, kind: int, flags: int, count: int, data: bytes = b"", level: int = log.ERROR) -> bool:
        request = abi.IRQ_SET.pack(abi.IRQ_SET.size + len(data), flags, kind, 0, count) + data
        try:
            fcntl.ioctl(self._fd, SET_IRQS, bytearray(request))  # bytes would be copied, up to 1024
        except OSError as error:
            log.limited(level, f"{self.name}: {count} interrupts of kind {kind} cannot be set: {error}")
            return False
        return True

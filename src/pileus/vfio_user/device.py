"""A PCI device to serve by vfio-user: subclass ``PciDevice``, and say what its registers do.

::

    class Counter(PciDevice):
        vendor, device = 0x1AF4, 0x10F0
        bars = {0: Bar(4096)}
        vectors = 1
        count = 0

        def read(self, bar, offset, size):
            self.count += 1
            self.interrupt(0)
            return self.count

    serve("/tmp/counter.socket", Counter())
"""

import errno
import fcntl
import mmap
import os
import threading

from pileus.pci import capability
from pileus.pci.bar import FLAGS, PREFETCHABLE, TYPE_64BIT
from pileus.pci.capability import Capabilities
from pileus.pci.config_space import BAR_COUNT, BARS, COMMAND, INTX_DISABLE, SIZE, STATUS, ConfigSpace
from pileus.vfio import abi
from pileus.vfio_user.dma import DmaSpace, Refused
from pileus.vfio_user.interrupts import Interrupts

INTERRUPT_PIN, PIN_A = 0x3D, 1
INTERRUPT_STATUS = 1 << 3  # of the status register
VECTOR_SIZE = 16
MSIX_ENABLE, MSIX_MASK = 1 << 15, 1 << 14
MIN_BAR = 4096  # so that no two share a page
PIECES = (8, 4, 2, 1)


class Bar:
    """A BAR of ``size`` bytes, a power of two. One that is ``shared`` is memory, which the client may map:
    nobody is asked for its bytes."""

    __slots__ = ("prefetchable", "shared", "size", "wide")

    def __init__(
        self, size: int, *, wide: bool = True, prefetchable: bool = False, shared: bool = False
    ) -> None:
        if size < MIN_BAR or size & (size - 1):
            raise ValueError(f"a BAR of {size:#x} bytes: a power of two from {MIN_BAR} is needed")
        self.size = size
        self.wide = wide
        self.prefetchable = prefetchable
        self.shared = shared


class SharedMemory:
    """``memory`` are the bytes of a file that both ends map, and that neither can make shorter."""

    def __init__(self, name: str, size: int) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(
                self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self.memory = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


class PciDevice:
    """Subclasses set the ids, ``bars``, ``vectors`` (of MSI-X) and ``pin`` (whether there is INTA), and
    override ``read``, ``write`` and ``reset``. All three are called on the thread that serves, one at a time.
    """

    vendor = 0xFFFF
    device = 0xFFFF
    subsystem_vendor = 0
    subsystem = 0
    class_code = 0xFF0000  # what fits no other class
    revision = 0
    bars: dict[int, Bar] = {}  # noqa: RUF012 - by the number of the first register
    vectors = 0
    pin = False

    def __init__(self) -> None:
        self.dma = DmaSpace()
        self._line = threading.Lock()  # over what decides of the pin: the status and command registers
        self.irqs = Interrupts(
            {abi.INTX: int(self.pin), abi.MSI: 0, abi.MSIX: self.vectors, abi.ERR: 0, abi.REQ: 0}
        )
        self._bars = dict(self.bars)
        self._msix_bar = self._place_msix()
        self.shared: dict[int, SharedMemory] = {
            index: SharedMemory(f"bar{index}", bar.size) for index, bar in self._bars.items() if bar.shared
        }
        self._table = bytearray(0 if self._msix_bar is None else self._bars[self._msix_bar].size)
        self.config = self._make_config()

    # -- what a subclass overrides ----------------------------------------------------------------

    def read(self, bar: int, offset: int, size: int) -> int:
        """What a driver reads there; ``size`` is 1, 2, 4 or 8."""
        return 0

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A driver wrote that."""

    def reset(self) -> None:
        """Be as at first. Registers of PCI itself are seen to already."""

    # -- what it may use --------------------------------------------------------------------------

    def interrupt(self, vector: int = 0) -> None:
        """Send that message; any thread may. What the driver did not ask for goes nowhere."""
        self.irqs.signal(vector)

    def set_line(self, level: bool) -> None:
        """Assert or release INTA, for drivers that use no messages; any thread may."""
        with self._line:
            status = self.config.get(STATUS, 2)
            self.config.set(STATUS, 2, status | INTERRUPT_STATUS if level else status & ~INTERRUPT_STATUS)
            self._drive_line()

    # -- what the server uses ---------------------------------------------------------------------

    def region(self, index: int) -> abi.RegionInfo:
        """Raises Refused where there is none."""
        if index == abi.CONFIG:
            return abi.RegionInfo(index, SIZE, abi.READ | abi.WRITE)
        if not 0 <= index < abi.REGIONS:
            raise Refused(errno.EINVAL)
        bar = self._bars.get(index)
        if bar is None:
            return abi.RegionInfo(index)
        return abi.RegionInfo(index, bar.size, abi.READ | abi.WRITE | (abi.MMAP if bar.shared else 0))

    def read_region(self, index: int, offset: int, count: int) -> bytes:
        """Raises Refused outside of a region."""
        self._check(index, offset, count)
        if index == abi.CONFIG:
            return self.config.read(offset, count).to_bytes(count, "little")
        if index in self.shared:
            return self.shared[index].memory[offset : offset + count]
        if index == self._msix_bar:
            return bytes(self._table[offset : offset + count])
        parts = []
        for at, size in pieces(offset, count):
            value = self.read(index, at, size) & (1 << 8 * size) - 1
            parts.append(value.to_bytes(size, "little"))
        return b"".join(parts)

    def write_region(self, index: int, offset: int, data: bytes) -> None:
        """Likewise."""
        self._check(index, offset, len(data))
        if index == abi.CONFIG:
            with self._line:
                self.config.write(offset, len(data), int.from_bytes(data, "little"))
                self._drive_line()  # a driver may have turned the pin off, or on again
        elif index in self.shared:
            self.shared[index].memory[offset : offset + len(data)] = data
        elif index == self._msix_bar:
            self._table[offset : offset + len(data)] = data
        else:
            for at, size in pieces(offset, len(data)):
                self.write(index, at, size, int.from_bytes(data[at - offset : at - offset + size], "little"))

    def reset_all(self) -> None:
        """The registers of PCI, too."""
        self.set_line(False)
        self.config.restore(bytes(SIZE))
        self._table[:] = bytes(len(self._table))
        self.reset()

    def forget_client(self) -> None:
        """It has gone: its memory and its eventfds go too, and the device stays as it is."""
        self.dma.messages = None
        self.dma.clear()
        self.irqs.clear()

    def close(self) -> None:
        self.forget_client()
        for shared in self.shared.values():
            shared.close()
        self.shared.clear()

    def _drive_line(self) -> None:
        asserted = self.config.get(STATUS, 2) & INTERRUPT_STATUS
        disabled = self.config.get(COMMAND, 2) & INTX_DISABLE
        self.irqs.set_line(bool(asserted and not disabled))

    def _check(self, index: int, offset: int, count: int) -> None:
        size = self.region(index).size
        if not 0 < count <= size or offset > size - count:
            raise Refused(errno.EINVAL)

    def _place_msix(self) -> int | None:
        """A BAR for the table and the pending bits behind it: the last that is free."""
        if not self.vectors:
            return None
        taken = set(self._bars) | {index + 1 for index, bar in self._bars.items() if bar.wide}
        index = max(set(range(BAR_COUNT)) - taken)
        size = self.vectors * VECTOR_SIZE + -(-self.vectors // 64) * 8
        self._bars[index] = Bar(max(MIN_BAR, 1 << (size - 1).bit_length()), wide=False)
        return index

    def _make_config(self) -> ConfigSpace:
        config = ConfigSpace(
            vendor=self.vendor,
            device=self.device,
            class_code=self.class_code,
            revision=self.revision,
            subsystem_vendor=self.subsystem_vendor or self.vendor,
            subsystem=self.subsystem or self.device,
        )
        config.set(INTERRUPT_PIN, 1, PIN_A if self.pin else 0)
        for index, bar in self._bars.items():
            width = 8 if bar.wide else 4
            config.set(BARS + 4 * index, width, bar.wide * TYPE_64BIT | bar.prefetchable * PREFETCHABLE)
            config.allow(BARS + 4 * index, width, (1 << 8 * width) - bar.size & ~FLAGS)
        if self._msix_bar is not None:
            pending = self.vectors * VECTOR_SIZE
            body = (self.vectors - 1).to_bytes(2, "little") + self._msix_bar.to_bytes(4, "little")
            body += (pending | self._msix_bar).to_bytes(4, "little")
            Capabilities(config).add(capability.MSIX, body, (MSIX_ENABLE | MSIX_MASK).to_bytes(2, "little"))
        return config


def pieces(offset: int, count: int) -> "list[tuple[int, int]]":
    """``count`` bytes from ``offset`` as (offset, size) of aligned accesses, as wide as can be."""
    found = []
    end = offset + count
    while offset < end:
        size = next(size for size in PIECES if not offset % size and offset + size <= end)
        found.append((offset, size))
        offset += size
    return found

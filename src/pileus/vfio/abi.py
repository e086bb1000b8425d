"""Numbers and structures of VFIO, which the kernel's ioctls and the messages of vfio-user have in common.

Source: <linux/vfio.h>
"""

from struct import Struct

from pileus.errors import RemoteProtocolError

BAR0, ROM, CONFIG, VGA, REGIONS = 0, 6, 7, 8, 9  # regions of a PCI device, and how many there are
INTX, MSI, MSIX, ERR, REQ, IRQS = range(6)  # interrupts of one, and how many kinds

DEVICE_INFO = Struct("=IIII")  # argsz, flags, regions, irqs
DEVICE_RESET, DEVICE_PCI = 1 << 0, 1 << 1

REGION_INFO = Struct("=IIIIQQ")  # argsz, flags, index, where capabilities begin, size, offset
READ, WRITE, MMAP, CAPS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
CAPABILITY = Struct("=HHI")  # id, version, where the next one begins
SPARSE_MMAP, MSIX_MAPPABLE = 1, 3
SPARSE = Struct("=II")  # areas, reserved
AREA = Struct("=QQ")  # offset, size
MAX_CAPABILITIES, MAX_AREAS = 16, 64  # more than any device has

IRQ_INFO = Struct("=IIII")  # argsz, flags, index, count
EVENTFD, MASKABLE, AUTOMASKED, NORESIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3

IRQ_SET = Struct("=IIIII")  # argsz, flags, index, start, count
DATA_NONE, DATA_BOOL, DATA_EVENTFD = 1 << 0, 1 << 1, 1 << 2
ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER = 1 << 3, 1 << 4, 1 << 5
DATA, ACTION = 0x7, 0x38
MAX_IRQS = 2048  # of one kind: what MSI-X can have

DMA_READ, DMA_WRITE = 1 << 0, 1 << 1
MAX_REGION = 1 << 52  # bytes: beyond any address


class RegionInfo:
    """A region: what may be done with it, its size, and where in a file the ``areas`` of it are that may be
    mapped, (offset in the region, size) each."""

    __slots__ = ("areas", "flags", "index", "offset", "size")

    def __init__(
        self,
        index: int,
        size: int = 0,
        flags: int = 0,
        offset: int = 0,
        areas: "list[tuple[int, int]] | None" = None,
    ) -> None:
        self.index = index
        self.size = size
        self.flags = flags
        self.offset = offset
        self.areas = areas or []


def decode_region(index: int, data: bytes) -> RegionInfo:
    """The answer to a question for region ``index``. Raises RemoteProtocolError for what cannot be one."""
    if len(data) < REGION_INFO.size:
        raise RemoteProtocolError(f"region {index} is described in {len(data)} bytes")
    _, flags, answered, start, size, offset = REGION_INFO.unpack_from(data)
    if answered != index or size > MAX_REGION or offset >= 1 << 63:
        raise RemoteProtocolError(f"region {index} is {answered}, with {size:#x} bytes at {offset:#x}")
    areas = [(0, size)] if flags & MMAP and size else []
    if flags & CAPS and start:
        sparse = _sparse_areas(index, data, start, size)
        areas = areas if sparse is None else sparse if flags & MMAP else []
    return RegionInfo(index, size, flags, offset, areas)


def _sparse_areas(index: int, data: bytes, start: int, size: int) -> "list[tuple[int, int]] | None":
    """What the capability of that name says, None where there is none."""
    for _ in range(MAX_CAPABILITIES):
        if start + CAPABILITY.size > len(data):
            raise RemoteProtocolError(f"region {index}: a capability at {start} of {len(data)} bytes")
        kind, _, following = CAPABILITY.unpack_from(data, start)
        if kind == SPARSE_MMAP:
            return _areas(index, data, start + CAPABILITY.size, size)
        if not following:
            return None
        start = following
    raise RemoteProtocolError(f"region {index}: more than {MAX_CAPABILITIES} capabilities")


def _areas(index: int, data: bytes, start: int, size: int) -> "list[tuple[int, int]]":
    if start + SPARSE.size > len(data):
        raise RemoteProtocolError(f"region {index}: a capability is cut off")
    count, _ = SPARSE.unpack_from(data, start)
    start += SPARSE.size
    if count > MAX_AREAS or start + count * AREA.size > len(data):
        raise RemoteProtocolError(f"region {index}: {count} areas in {len(data)} bytes")
    areas = sorted(AREA.unpack_from(data, start + AREA.size * each) for each in range(count))
    end = 0
    for offset, length in areas:
        if offset < end or length > size or offset > size - length:
            raise RemoteProtocolError(f"region {index} of {size:#x} bytes: {length:#x} at {offset:#x} to map")
        end = offset + length
    return [area for area in areas if area[1]]


def encode_region(region: RegionInfo) -> bytes:
    """What ``decode_region`` reads; all of the region may be mapped, or nothing."""
    return REGION_INFO.pack(REGION_INFO.size, region.flags, region.index, 0, region.size, region.offset)

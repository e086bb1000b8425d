"""The table that says which devices are behind the virtual IOMMU.

Source: ACPI 6.5, 5.2.32 (Virtual I/O Translation Table)
"""

from struct import Struct

from pileus.arch.x86_64.acpi.tables import HEADER_SIZE, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

REVISION = 0
HEAD = Struct("<HH8x")  # node count, offset of the first node
PCI_RANGE = Struct(
    "<BxHIHHHHH6x"
)  # type, length, first endpoint, segments, BDFs: first and last; output node
IOMMU_PCI = Struct("<BxHHH8x")  # type, length, segment, BDF
T_PCI_RANGE, T_IOMMU_PCI = 1, 3


def encode(iommu: int, endpoints: "Sequence[int]") -> bytes:
    """The virtio-iommu at BDF ``iommu``; devices behind it have their BDFs as IDs. All in segment 0."""
    first = HEADER_SIZE + HEAD.size
    nodes = IOMMU_PCI.pack(T_IOMMU_PCI, IOMMU_PCI.size, 0, iommu)
    for bdf in endpoints:
        nodes += PCI_RANGE.pack(T_PCI_RANGE, PCI_RANGE.size, bdf, 0, 0, bdf, bdf, first)
    return table(b"VIOT", REVISION, HEAD.pack(1 + len(endpoints), first) + nodes)

"""NVDIMMs: the NFIT, which says where their memory is, and the device in the DSDT that a driver binds to.

Each is one DIMM that fills one range of addresses by itself: no interleaving, and no label area, so that
Linux makes one namespace of all of it, ``/dev/pmemN``.

Source: ACPI 6.3, 5.2.25 (NVDIMM Firmware Interface Table), 9.20 (NVDIMM Devices)
"""

from struct import pack

from pileus.arch.x86_64.acpi import tables
from pileus.arch.x86_64.acpi.aml import device, name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

REVISION = 1
SPA_RANGE, REGION_MAPPING, CONTROL_REGION, FLUSH_HINT = 0, 1, 4, 6
# 66F0D379-B4F3-4074-AC43-0D3318B78CDB; the first three parts of a GUID are little-endian.
PERSISTENT_MEMORY = bytes.fromhex("79d3f066 f3b4 7440 ac43 0d3318b78cdb")
WRITE_BACK, NON_VOLATILE = 1 << 3, 1 << 15  # UEFI's memory attributes
BYTE_ADDRESSABLE = 0x301  # region format interface code: byte addressable, no energy of its own


class Nvdimm:
    """``size`` bytes at ``gpa``. A write to ``hint``, if there is one, makes what was stored durable."""

    __slots__ = ("gpa", "hint", "index", "size")

    def __init__(self, index: int, gpa: int, size: int, hint: int | None = None) -> None:
        self.index = index
        self.gpa = gpa
        self.size = size
        self.hint = hint

    @property
    def handle(self) -> int:
        """Its number on the controller, and ``_ADR`` in the DSDT; 0 is the controller's own."""
        return self.index + 1


def root_device(nvdimms: "Sequence[Nvdimm]") -> bytes:
    """``NVDR`` with a child per DIMM. None has methods: no labels, no health, no errors to look for."""
    children = (device(f"N{each.index:03X}", name("_ADR", each.handle)) for each in nvdimms)
    return device("NVDR", name("_HID", "ACPI0012"), *children)


def table(nvdimms: "Sequence[Nvdimm]") -> bytes:
    """The NFIT, header included."""
    return tables.table(b"NFIT", REVISION, bytes(4) + b"".join(map(_structures, nvdimms)))


def _structures(nvdimm: Nvdimm) -> bytes:
    """A range, the DIMM that fills it, and what that is; ``number`` ties them together."""
    number = nvdimm.index + 1  # 0 is none
    spa = pack("<HHI", number, 0, 0) + pack(
        "<I16sQQQ", 0, PERSISTENT_MEMORY, nvdimm.gpa, nvdimm.size, WRITE_BACK | NON_VOLATILE
    )
    mapping = pack("<IHHHH", nvdimm.handle, nvdimm.index, 0, number, number)
    mapping += pack("<QQQHHHH", nvdimm.size, 0, 0, 0, 1, 0, 0)
    # Ids of vendor and subsystem and the DIMM's making are left out. There are no block windows; their 48
    # bytes could be left out, too, but iasl wants them.
    control = pack("<H18xIHH48x", number, number, BYTE_ADDRESSABLE, 0)
    found = _structure(SPA_RANGE, spa) + _structure(REGION_MAPPING, mapping)
    found += _structure(CONTROL_REGION, control)
    if nvdimm.hint is not None:
        found += _structure(FLUSH_HINT, pack("<IH6xQ", nvdimm.handle, 1, nvdimm.hint))
    return found


def _structure(kind: int, body: bytes) -> bytes:
    return pack("<HH", kind, 4 + len(body)) + body

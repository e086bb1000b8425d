"""The header of a QCOW2 file: what it says, and what of that is refused.

Source: QEMU, docs/interop/qcow2.rst, "Header", "Header extensions", "Feature name table".
"""

import struct

MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21  # 512 bytes to 2 MiB, as in QEMU
MAX_L1_SIZE = 32 << 20  # bytes
MAX_REFCOUNT_TABLE_SIZE = 8 << 20  # bytes
MAX_BACKING_NAME = 1023  # bytes
MAX_SNAPSHOTS = 65536
MAX_OFFSET = 1 << 56  # of anything that a table points at
MAX_SIZE = 1 << 62  # of a virtual disk: room for sums

_FIELDS = struct.Struct(">4sIQIIQIIQQIIQ")  # to the end of version 2: 72 bytes
_FIELDS_V3 = struct.Struct(">QQQII")  # 72 to 104
_EXTENSION = struct.Struct(">II")
_COMPRESSION_TYPE = 104  # a byte, if header_length reaches over it

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | COMPRESSION_TYPE
AUTOCLEAR_FEATURES_AT = 88  # of the header: u64
ENCRYPTIONS = {1: "AES", 2: "LUKS"}
COMPRESSIONS = {0: "zlib", 1: "zstd"}
REFUSED = {
    EXTERNAL_DATA: "its data is in another file (external data file)",
    EXTENDED_L2: "it has subclusters (extended L2 entries)",
}


class Header:
    """A checked header. Raises ValueError, in words that go on from "cannot open PATH: "."""

    def __init__(self, data: bytes) -> None:
        """``data``: the file's first cluster, or as much as there is; zeroes may follow it."""
        if len(data) < _FIELDS.size or data[:4] != MAGIC:
            raise ValueError("it is not a QCOW2 image")
        (
            _,
            self.version,
            backing_offset,
            backing_length,
            self.cluster_bits,
            self.size,
            encryption,
            self.l1_size,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        ) = _FIELDS.unpack_from(data)
        if self.version not in (2, 3):
            raise ValueError(f"it is QCOW2 of version {self.version}; 2 and 3 are known")
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise ValueError(
                f"its clusters have 2^{self.cluster_bits} bytes; 512 bytes to 2 MiB are supported"
            )
        self.cluster_size = 1 << self.cluster_bits
        data = data[: self.cluster_size]
        self.incompatible = self.compatible = self.autoclear = 0
        self.refcount_order, self.length = 4, _FIELDS.size
        if self.version >= 3:
            self._parse_version_3(data)
        self._extensions = _extensions(data, self.length)
        self._check_features()
        if encryption:
            name = ENCRYPTIONS.get(encryption, f"method {encryption}")
            raise ValueError(f"it is encrypted ({name}), which is not supported")
        self.zstd = self._compression(data) == "zstd"
        self._check_tables()
        self.backing_path = _backing_path(data, backing_offset, backing_length)
        form = self._extensions.get(EXTENSION_BACKING_FORMAT)
        self.backing_format = None if form is None else _text(form, "its backing file's format")
        self.snapshot_l1: list[tuple[int, int]] = []  # offset, entries: filled in by who reads the snapshots
        self.snapshots_size = 0  # bytes

    def _parse_version_3(self, data: bytes) -> None:
        if len(data) < self.length + _FIELDS_V3.size:
            raise ValueError("its header is cut off")
        self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.length = (
            _FIELDS_V3.unpack_from(data, self.length)
        )
        least = _FIELDS.size + _FIELDS_V3.size
        if not least <= self.length <= len(data) or self.length % 8:
            raise ValueError(
                f"its header length is {self.length}; a multiple of 8 from {least} to {len(data)} would do"
            )
        if self.refcount_order > 6:
            raise ValueError(f"its refcounts have 2^{self.refcount_order} bits; at most 64 are allowed")

    def _check_features(self) -> None:
        for bit in range(64):
            if self.incompatible & 1 << bit & ~KNOWN_INCOMPATIBLE:
                if why := REFUSED.get(1 << bit):
                    raise ValueError(f"{why}, which is not supported")
                name = self._feature_names().get(bit, "without a name")
                raise ValueError(f"it needs a feature that is not known here: bit {bit}, {name}")

    def _feature_names(self) -> dict[int, str]:
        """The names that the image itself gives to incompatible features."""
        table = self._extensions.get(EXTENSION_FEATURE_NAMES, b"")
        rows = [table[at : at + 48] for at in range(0, len(table) - 47, 48)]
        names = {row[1]: row[2:].rstrip(b"\0").decode("ascii", "replace") for row in rows if row[0] == 0}
        return {bit: repr(name) for bit, name in names.items() if name}

    def _compression(self, data: bytes) -> str:
        kind = data[_COMPRESSION_TYPE] if self.length > _COMPRESSION_TYPE else 0
        if bool(kind) != bool(self.incompatible & COMPRESSION_TYPE):
            raise ValueError(f"its compression type {kind} contradicts its feature bits")
        if kind not in COMPRESSIONS:
            raise ValueError(f"its compression type is {kind}; zlib (0) and zstd (1) are known")
        return COMPRESSIONS[kind]

    def _check_tables(self) -> None:
        if self.size > MAX_SIZE:
            raise ValueError(f"its disk has {self.size} bytes; at most {MAX_SIZE} are supported")
        self.check_l1(self.l1_offset, self.l1_size, self.size, "its L1 table")
        table = self.refcount_table_clusters << self.cluster_bits
        self._check_table(self.refcount_table_offset, table, MAX_REFCOUNT_TABLE_SIZE, "its refcount table")
        if not table:
            raise ValueError("it has no refcount table")
        if self.snapshot_count > MAX_SNAPSHOTS:
            raise ValueError(f"it has {self.snapshot_count} snapshots; at most {MAX_SNAPSHOTS} are supported")
        self._check_table(self.snapshots_offset, self.snapshot_count, MAX_L1_SIZE, "its table of snapshots")

    def check_l1(self, offset: int, entries: int, disk_size: int, what: str) -> None:
        """Raise ValueError unless this is an L1 table that a disk of ``disk_size`` bytes can have."""
        self._check_table(offset, 8 * entries, MAX_L1_SIZE, what)
        reach = entries << (2 * self.cluster_bits - 3)
        if reach < disk_size:
            raise ValueError(f"{what} covers {reach} bytes of a disk of {disk_size}")

    def _check_table(self, offset: int, size: int, most: int, what: str) -> None:
        if size > most:
            raise ValueError(f"{what} has {size} bytes; at most {most} are supported")
        if size and (offset % self.cluster_size or not offset or offset > MAX_OFFSET - most):
            raise ValueError(f"{what} is at {offset:#x}, which is no place of a cluster")

    def tables(self) -> list[tuple[int, int, str]]:
        """First cluster, count and name of each table that has its place from the start."""
        found = [
            (0, self.cluster_size, "its header"),
            (self.l1_offset, 8 * self.l1_size, "its L1 table"),
            (
                self.refcount_table_offset,
                self.refcount_table_clusters << self.cluster_bits,
                "its refcount table",
            ),
            (self.snapshots_offset, self.snapshots_size, "its table of snapshots"),
            *((offset, 8 * entries, "the L1 table of a snapshot") for offset, entries in self.snapshot_l1),
        ]
        return [
            (offset >> self.cluster_bits, -(-size >> self.cluster_bits), what)
            for offset, size, what in found
            if size
        ]


def _extensions(data: bytes, at: int) -> dict[int, bytes]:
    """The header extensions behind the header, by type."""
    found: dict[int, bytes] = {}
    while at + _EXTENSION.size <= len(data):
        kind, length = _EXTENSION.unpack_from(data, at)
        if kind == EXTENSION_END:
            break
        at += _EXTENSION.size
        if length > len(data) - at:
            raise ValueError(
                f"its header extension {kind:#x} has {length} bytes, more than its first cluster"
            )
        found.setdefault(kind, data[at : at + length])
        at += length + -length % 8
    return found


def _backing_path(data: bytes, offset: int, length: int) -> str | None:
    if not offset:
        return None
    if length > MAX_BACKING_NAME or offset + length > len(data):
        raise ValueError(f"its backing file's name, {length} bytes at {offset:#x}, is out of bounds")
    return _text(data[offset : offset + length], "its backing file's name") or None


def _text(data: bytes, what: str) -> str:
    if b"\0" in data:
        raise ValueError(f"{what} holds a zero byte")
    return data.decode("utf-8", "surrogateescape")  # as the host's paths are

"""QCOW2 once more, slow and whole: makes empty images, reads and checks any without compressed clusters."""

import struct
from pathlib import Path

from pileus.block.qcow2_header import EXTENSION_BACKING_FORMAT

HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
HEADER_V3 = struct.Struct(">QQQII")
COPIED, COMPRESSED, ZERO, OFFSET = 1 << 63, 1 << 62, 1, 0x00FFFFFFFFFFFE00


def create(
    path: Path,
    size: int,
    *,
    cluster_bits: int = 16,
    version: int = 3,
    refcount_order: int = 4,
    backing: str = "",
    backing_format: str = "",
    features: tuple[int, int, int] = (0, 0, 0),
    extensions: bytes = b"",
) -> Path:
    """An image with nothing in it: header, refcount table, one refcount block, L1 table."""
    cluster = 1 << cluster_bits
    l1_entries = -(-size // (cluster * cluster // 8)) or 1
    l1_clusters = -(-8 * l1_entries // cluster)
    used = 3 + l1_clusters
    assert used <= cluster * 8 >> refcount_order, "one block has to do"
    if backing_format:
        extensions += (
            struct.pack(">II", EXTENSION_BACKING_FORMAT, len(backing_format)) + backing_format.encode()
        )
        extensions += bytes(-len(extensions) % 8)
    extensions += bytes(8)
    length = HEADER.size + (HEADER_V3.size if version == 3 else 0)
    name = backing.encode()
    head = HEADER.pack(
        b"QFI\xfb",
        version,
        length + len(extensions) if name else 0,
        len(name),
        cluster_bits,
        size,
        0,
        l1_entries,
        3 * cluster,
        cluster,
        1,
        0,
        0,
    )
    if version == 3:
        head += HEADER_V3.pack(*features, refcount_order, length)
    head += extensions + name
    block = 0
    for index in range(used):
        block |= _entry(index, 1, refcount_order)
    with path.open("wb") as file:
        file.write(head.ljust(cluster, b"\0"))
        file.write((2 * cluster).to_bytes(8, "big").ljust(cluster, b"\0"))
        file.write(block.to_bytes(cluster, "little"))
        file.write(bytes(l1_clusters * cluster))
    return path


def _entry(index: int, value: int, order: int) -> int:
    """A refcount in a block read as one little-endian number: bytes are swapped within wide entries."""
    bits = 1 << order
    if bits > 8:
        value = int.from_bytes(value.to_bytes(bits // 8, "big"), "little")
    return value << (index * bits)


class Twin:
    """What a file says; ``backing`` is what a disk behind it holds."""

    def __init__(self, path: Path, backing: bytes = b"") -> None:
        self.data, self.backing = path.read_bytes(), backing
        fields = HEADER.unpack_from(self.data)
        self.version, self.cluster_bits, self.size = fields[1], fields[4], fields[5]
        self.l1_size, self.l1_offset, self.table_offset, self.table_clusters = fields[7:11]
        self.order = HEADER_V3.unpack_from(self.data, HEADER.size)[3] if self.version == 3 else 4
        self.cluster = 1 << self.cluster_bits

    def numbers(self, offset: int, count: int) -> tuple[int, ...]:
        data = self.data[offset : offset + 8 * count].ljust(8 * count, b"\0")
        return struct.unpack(f">{count}Q", data)

    def l1(self) -> tuple[int, ...]:
        return self.numbers(self.l1_offset, self.l1_size)

    def l2(self, entry: int) -> tuple[int, ...]:
        return self.numbers(entry & OFFSET, self.cluster // 8)

    def entries(self) -> list[int]:
        """The L2 entry of each cluster of the disk."""
        found: list[int] = []
        for entry in self.l1():
            found += self.l2(entry) if entry else [0] * (self.cluster // 8)
        return found[: -(-self.size // self.cluster)]

    def refcounts(self) -> dict[int, int]:
        """Those that are not 0, by cluster."""
        found = {}
        bits = 1 << self.order
        per_block = self.cluster * 8 // bits
        for index, place in enumerate(
            self.numbers(self.table_offset, self.table_clusters * self.cluster // 8)
        ):
            if not place:
                continue
            block = self.data[place : place + self.cluster].ljust(self.cluster, b"\0")
            for inside in range(per_block):
                if bits >= 8:
                    value = int.from_bytes(block[inside * bits // 8 : (inside + 1) * bits // 8], "big")
                else:
                    value = block[inside * bits // 8] >> (inside * bits % 8) & ((1 << bits) - 1)
                if value:
                    found[index * per_block + inside] = value
        return found

    def references(self) -> dict[int, int]:
        """How often each cluster is referred to, the header's included."""
        found: dict[int, int] = {}

        def refer(offset: int, size: int) -> None:
            for cluster in range(offset // self.cluster, -(-(offset + size) // self.cluster)):
                found[cluster] = found.get(cluster, 0) + 1

        refer(0, self.cluster)
        refer(self.l1_offset, 8 * self.l1_size)
        refer(self.table_offset, self.table_clusters * self.cluster)
        for place in self.numbers(self.table_offset, self.table_clusters * self.cluster // 8):
            if place:
                refer(place, self.cluster)
        for entry in self.l1():
            if entry:
                refer(entry & OFFSET, self.cluster)
        for entry in self.entries():
            if entry & OFFSET:
                refer(entry & OFFSET, self.cluster)
        return found

    def check(self) -> None:
        """Every cluster counted as often as it is referred to, and flagged so."""
        assert self.refcounts() == self.references()
        for entry in self.entries():
            assert not entry & COMPRESSED
            assert bool(entry & COPIED) == bool(entry & OFFSET)

    def disk(self) -> bytes:
        pieces = []
        for index, entry in enumerate(self.entries()):
            start = index * self.cluster
            if entry & ZERO:
                piece = b""
            elif entry & OFFSET:
                piece = self.data[entry & OFFSET :][: self.cluster]
            else:
                piece = self.backing[start : start + self.cluster]
            pieces.append(piece.ljust(self.cluster, b"\0"))
        return b"".join(pieces)[: self.size]

"""The internal snapshots of a QCOW2 file.

Source: QEMU, docs/interop/qcow2.rst, "Snapshots".
"""

import struct

from pileus.block.qcow2_header import Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ENTRY = struct.Struct(">QIHHIIQII")  # 40 bytes, then extra data, ID, name
_DISK_SIZE_AT = 8  # of the extra data: u64
MAX_EXTRA = 1024  # bytes, as in QEMU
MAX_TABLE = 64 << 20  # bytes
MAX_L1_TOTAL = 256 << 20  # bytes of all snapshots' L1 tables


class Snapshot:
    """A state of the disk that was kept: its L1 table (offset and entries) and the size it had in bytes."""

    def __init__(self, key: str, name: str, l1: tuple[int, int], size: int) -> None:
        self.key, self.name, self.l1, self.size = key, name, l1, size


def read_snapshots(header: Header, read: "Callable[[int, int], bytes]") -> list[Snapshot]:
    """All of them, by ``read(offset, length)``; ``header`` learns where they are. Raises ValueError."""
    found: list[Snapshot] = []
    at, total = header.snapshots_offset, 0
    for index in range(header.snapshot_count):
        l1_offset, l1_size, key_length, name_length, *_, extra_length = _ENTRY.unpack(read(at, _ENTRY.size))
        if extra_length > MAX_EXTRA:
            raise ValueError(
                f"its snapshot {index} has {extra_length} bytes of extra data; {MAX_EXTRA} would do"
            )
        variable = read(at + _ENTRY.size, extra_length + key_length + name_length)
        extra, strings = variable[:extra_length], variable[extra_length:]
        size = header.size
        if extra_length >= _DISK_SIZE_AT + 8:
            size = int.from_bytes(extra[_DISK_SIZE_AT : _DISK_SIZE_AT + 8], "big")
        key, name = strings[:key_length], strings[key_length:]
        header.check_l1(l1_offset, l1_size, 0, f"the L1 table of its snapshot {index}")
        found.append(Snapshot(_name(key), _name(name), (l1_offset, l1_size), size))
        at += _ENTRY.size + len(variable)
        at += -at % 8
        total += 8 * l1_size
        if total > MAX_L1_TOTAL:
            raise ValueError(f"the L1 tables of its snapshots have more than {MAX_L1_TOTAL} bytes")
        if at - header.snapshots_offset > MAX_TABLE:
            raise ValueError(f"its table of snapshots has more than {MAX_TABLE} bytes")
    header.snapshots_size = at - header.snapshots_offset
    header.snapshot_l1 = [snapshot.l1 for snapshot in found]
    return found


def find_snapshot(snapshots: list[Snapshot], wanted: str) -> Snapshot:
    """The one with this ID, or else with this name. Raises ValueError."""
    for matches in (
        [each for each in snapshots if each.key == wanted],
        [s for s in snapshots if s.name == wanted],
    ):
        if matches:
            return matches[0]
    known = ", ".join(f"{each.key} ({each.name})" for each in snapshots[:16]) or "none"
    raise ValueError(f"it has no snapshot {wanted!r}; there is {known}")


def _name(data: bytes) -> str:
    return data.decode("utf-8", "replace")

"""Requests of virtio-blk, as bytes and as chains of any layout."""

import struct
from collections.abc import Sequence

from pileus.testing import FakeDriver

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
UNMAP = 1


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """``data`` in pieces of ``sizes`` and the rest."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in [*pieces, data] if piece]


class Disk:
    """A driver that waits for each request's end, unless told otherwise."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver

    def request(
        self,
        readable: bytes,
        room: int = 0,
        *,
        cuts: Sequence[int] = (),
        indirect: bool = False,
        queue: int = 0,
    ) -> tuple[int, bytes]:
        """The status and what came back; both sides cut into buffers of sizes ``cuts`` and the rest."""
        holes = [len(piece) for piece in cut(bytes(room + 1), cuts)]
        head = self.driver.add(cut(readable, cuts), holes, queue, indirect)
        self.driver.kick(queue)
        (used,) = self.driver.wait(queue)
        assert used.head == head
        data = self.driver.read(head, queue)
        if data[-1] == OK and readable[0] in (IN, GET_ID):
            assert used.length == (room + 1 if readable[0] == IN else min(room + 1, 20 + (room == 20)))
        return data[-1], data[:-1]

    def read(self, sector: int, length: int, **how: object) -> bytes:
        status, data = self.request(header(IN, sector), length, **how)  # type: ignore[arg-type]
        assert status == OK
        return data

    def write(self, sector: int, data: bytes, **how: object) -> int:
        return self.request(header(OUT, sector) + data, **how)[0]  # type: ignore[arg-type]

    def flush(self) -> int:
        return self.request(header(FLUSH))[0]

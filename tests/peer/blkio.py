"""libblkio, called as it is: requests from a real front-end, at any place and on any queue."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peer.vhost_user import LIBRARIES

LIBRARY = LIBRARIES / "libblkio.so.1"
DRIVER = b"virtio-blk-vhost-user"


class Region(ctypes.Structure):
    _fields_ = [  # struct blkio_mem_region
        ("addr", ctypes.c_void_p),
        ("unique", ctypes.c_uint64),
        ("len", ctypes.c_size_t),
        ("fd_offset", ctypes.c_int64),
        ("fd", ctypes.c_int),
        ("reserved", ctypes.c_char * 28),
    ]


class Completion(ctypes.Structure):
    _fields_ = [  # struct blkio_completion
        ("user_data", ctypes.c_void_p),
        ("error_msg", ctypes.c_char_p),
        ("ret", ctypes.c_int),
        ("reserved", ctypes.c_char * 12),
    ]


class Blkio:
    """A disk behind the socket ``path``, with ``queues``, and ``room`` bytes of memory for requests."""

    def __init__(self, path: Path, queues: int = 1, room: int = 4 << 20, readonly: bool = False) -> None:
        self._library = ctypes.CDLL(str(LIBRARY))
        self._library.blkio_get_error_msg.restype = ctypes.c_char_p
        self._library.blkio_get_queue.restype = ctypes.c_void_p
        self._disk = ctypes.c_void_p()
        self._check(self._library.blkio_create(DRIVER, ctypes.byref(self._disk)))
        self._check(self._library.blkio_set_str(self._disk, b"path", str(path).encode()))
        if readonly:
            self._check(self._library.blkio_set_bool(self._disk, b"read-only", True))
        self._check(self._library.blkio_connect(self._disk))
        self.capacity = self.number(b"capacity")
        self._check(self._library.blkio_set_int(self._disk, b"num-queues", queues))
        self._check(self._library.blkio_start(self._disk))
        self._region = Region()
        room += -room % mmap.PAGESIZE
        self._check(
            self._library.blkio_alloc_mem_region(
                self._disk, ctypes.byref(self._region), ctypes.c_size_t(room)
            )
        )
        self._check(self._library.blkio_map_mem_region(self._disk, ctypes.byref(self._region)))
        self.queues = [
            ctypes.c_void_p(self._library.blkio_get_queue(self._disk, index)) for index in range(queues)
        ]

    def close(self) -> None:
        self._library.blkio_destroy(ctypes.byref(self._disk))

    def number(self, name: bytes) -> int:
        value = ctypes.c_uint64()
        self._check(self._library.blkio_get_uint64(self._disk, name, ctypes.byref(value)))
        return value.value

    def fill(self, place: int, data: bytes) -> None:
        """Put ``data`` into the memory of requests."""
        ctypes.memmove(self._region.addr + place, data, len(data))

    def held(self, place: int, length: int) -> bytes:
        return ctypes.string_at(self._region.addr + place, length)

    def read(self, queue: int, start: int, place: int, length: int, tag: int) -> None:
        self._library.blkioq_read(
            self.queues[queue], ctypes.c_uint64(start), ctypes.c_void_p(self._region.addr + place),
            ctypes.c_size_t(length), ctypes.c_void_p(tag), ctypes.c_uint32(0),
        )  # fmt: skip

    def write(self, queue: int, start: int, place: int, length: int, tag: int) -> None:
        self._library.blkioq_write(
            self.queues[queue], ctypes.c_uint64(start), ctypes.c_void_p(self._region.addr + place),
            ctypes.c_size_t(length), ctypes.c_void_p(tag), ctypes.c_uint32(0),
        )  # fmt: skip

    def flush(self, queue: int, tag: int) -> None:
        self._library.blkioq_flush(self.queues[queue], ctypes.c_void_p(tag), ctypes.c_uint32(0))

    def complete(self, queue: int, least: int, most: int) -> list[tuple[int, int]]:
        """(tag, result) of what is done, once there are ``least``."""
        completions = (Completion * most)()
        count = self._library.blkioq_do_io(self.queues[queue], completions, least, most, None)
        self._check(min(count, 0))
        return [(each.user_data or 0, each.ret) for each in completions[:count]]

    def _check(self, result: int) -> None:
        if result < 0:
            raise OSError(-result, self._library.blkio_get_error_msg().decode())


@contextmanager
def blkio(path: Path, queues: int = 1, readonly: bool = False) -> Iterator[Blkio]:
    disk = Blkio(path, queues, readonly=readonly)
    try:
        yield disk
    finally:
        disk.close()

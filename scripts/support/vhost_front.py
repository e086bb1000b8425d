"""The little of a vhost-user front-end that a benchmark needs: one region of memory, any number of queues.

Source: QEMU, docs/interop/vhost-user.rst
"""

import array
import os
import socket
import struct
import time
from pathlib import Path

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE = 8, 9, 10
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE = 15, 16, 18

VERSION, REPLY = 1, 4
HEADER = struct.Struct("=III")  # request, flags, size of the payload in bytes
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log
MEM_TABLE = struct.Struct("=IIQQQQ")  # regions, padding, gpa, size, address of ours, offset in the file

PROTOCOL_FEATURES = 1 << 30
VERSION_1, EVENT_IDX, INDIRECT = 1 << 32, 1 << 29, 1 << 28
USER_BASE = 1 << 40  # where "our" memory is: any address will do, as long as the tables agree


class VhostFront:
    """A session with the back-end that listens at ``path``; ``memory_fd`` is all RAM, from 0.

    ``features`` of the device are wanted besides those of its rings.
    """

    def __init__(self, path: Path, memory_fd: int, memory_size: int, features: int = 0) -> None:
        self.socket = _connect(path)
        offered = self._ask(GET_FEATURES)
        self._tell(SET_OWNER)
        wanted = VERSION_1 | EVENT_IDX | INDIRECT | PROTOCOL_FEATURES | features
        self.features = offered & wanted
        if offered & PROTOCOL_FEATURES:
            self._ask(GET_PROTOCOL_FEATURES)
            self._tell(SET_PROTOCOL_FEATURES, U64.pack(0))
        self._tell(SET_FEATURES, U64.pack(self.features))
        self._tell(SET_MEM_TABLE, MEM_TABLE.pack(1, 0, 0, memory_size, USER_BASE, 0), [memory_fd])

    def start_queue(self, index: int, size: int, rings: tuple[int, int, int], kick: int, call: int) -> None:
        """``rings``: the GPAs of descriptor table, available and used ring."""
        descriptors, available, used = (USER_BASE + gpa for gpa in rings)
        self._tell(SET_VRING_NUM, VRING_STATE.pack(index, size))
        self._tell(SET_VRING_BASE, VRING_STATE.pack(index, 0))
        self._tell(SET_VRING_ADDR, VRING_ADDR.pack(index, 0, descriptors, used, available, 0))
        self._tell(SET_VRING_CALL, U64.pack(index), [call])
        self._tell(SET_VRING_KICK, U64.pack(index), [kick])
        if self.features & PROTOCOL_FEATURES:
            self._tell(SET_VRING_ENABLE, VRING_STATE.pack(index, 1))
        self._ask(GET_FEATURES)  # what was told before has been seen to

    def close(self) -> None:
        self.socket.close()

    def _tell(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([HEADER.pack(request, VERSION, len(payload)) + payload], ancillary)

    def _ask(self, request: int) -> int:
        self._tell(request)
        answer = self.socket.recv(HEADER.size + U64.size, socket.MSG_WAITALL)
        number, flags, size = HEADER.unpack_from(answer)
        assert (number, flags & REPLY, size) == (request, REPLY, U64.size), answer
        return int(U64.unpack_from(answer, HEADER.size)[0])


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(os.fspath(path))
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return connection

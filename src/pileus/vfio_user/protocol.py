"""The messages of vfio-user, for both ends: bytes in, messages out, and no I/O.

Either end may ask; replies carry the number of what they answer. ``REQUESTS`` and ``REPLIES`` are tables of
layouts, by which each message is judged before anyone sees it.

Source: vfio-user protocol 0.9 (QEMU, docs/interop/vfio-user.rst)
"""

import json
from enum import IntEnum
from struct import Struct

from pileus.errors import RemoteProtocolError
from pileus.vfio import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAJOR, MINOR = 0, 0
HEADER = Struct("=HHIII")  # id, command, bytes with this header, flags, errno
REPLY, TYPE, NO_REPLY, ERROR = 0x1, 0xF, 0x10, 0x20
FLAGS = REPLY | NO_REPLY | ERROR
MAX_TRANSFER = 1 << 20  # bytes of data in one message: the protocol's own default
MAX_SIZE = HEADER.size + 16 + MAX_TRANSFER
MAX_FDS = 16  # that we take with one message; there are clients that refuse servers with more
MAX_DMA_MAPS = 65535
PAGE_SIZE = 4096
MAX_JSON = 4096


class Command(IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13


class Layout:
    """``head``, then up to ``tail`` bytes, and up to ``fds`` descriptors. ``counted``: the value of the head
    that says how long the tail is."""

    __slots__ = ("counted", "fds", "head", "tail")

    def __init__(self, head: str, tail: int = 0, fds: int = 0, counted: int | None = None) -> None:
        self.head = Struct("=" + head)
        self.tail = tail
        self.fds = fds
        self.counted = counted


IO_FDS = Struct("=IIII")  # argsz, flags, region, count
IO_FD = Struct("=QQIIIIQ")  # offset, size, index of the descriptor, type, flags, padding, datamatch
IOEVENTFD = 0  # type
DATAMATCH = 1  # flag, as in <linux/kvm.h>

REQUESTS = {
    Command.VERSION: Layout("HH", tail=MAX_JSON),  # major, minor, then JSON
    Command.DMA_MAP: Layout("IIQQQ", fds=1),  # argsz, flags, offset in the file, iova, size
    Command.DMA_UNMAP: Layout("IIQQ"),  # argsz, flags, iova, size
    Command.DEVICE_GET_INFO: Layout("IIII"),
    Command.DEVICE_GET_REGION_INFO: Layout("IIIIQQ"),
    Command.DEVICE_GET_REGION_IO_FDS: Layout("IIII"),
    Command.DEVICE_GET_IRQ_INFO: Layout("IIII"),
    Command.DEVICE_SET_IRQS: Layout("IIIII", tail=abi.MAX_IRQS, fds=MAX_FDS),
    Command.REGION_READ: Layout("QII"),  # offset, region, count
    Command.REGION_WRITE: Layout("QII", tail=MAX_TRANSFER, counted=2),
    Command.DMA_READ: Layout("QQ"),  # iova, count
    Command.DMA_WRITE: Layout("QQ", tail=MAX_TRANSFER, counted=1),
    Command.DEVICE_RESET: Layout(""),
}
REPLIES = {
    Command.VERSION: Layout("HH", tail=MAX_JSON, fds=1),
    Command.DMA_MAP: Layout("", tail=32),  # nothing; some servers send the request back
    Command.DMA_UNMAP: Layout("", tail=24),
    Command.DEVICE_GET_INFO: Layout("IIII"),
    Command.DEVICE_GET_REGION_INFO: Layout("IIIIQQ", tail=MAX_JSON, fds=1),
    Command.DEVICE_GET_REGION_IO_FDS: Layout("IIII", tail=MAX_JSON, fds=MAX_FDS),
    Command.DEVICE_GET_IRQ_INFO: Layout("IIII"),
    Command.DEVICE_SET_IRQS: Layout(""),
    Command.REGION_READ: Layout("QII", tail=MAX_TRANSFER, counted=2),
    Command.REGION_WRITE: Layout("QII"),
    Command.DMA_READ: Layout("QQ", tail=MAX_TRANSFER, counted=1),
    Command.DMA_WRITE: Layout("QI", tail=4),  # 32 or 64 bits of count: the protocol says this and that
    Command.DEVICE_RESET: Layout(""),
}


class Message:
    """``values`` are those of the head and ``tail`` the bytes behind it; an error has neither."""

    __slots__ = ("command", "error", "flags", "number", "tail", "values")

    def __init__(
        self,
        command: int,
        *values: int,
        tail: bytes = b"",
        number: int = 0,
        flags: int = 0,
        error: int = 0,
    ) -> None:
        self.command = command
        self.values = values
        self.tail = tail
        self.number = number
        self.flags = flags
        self.error = error

    @property
    def is_reply(self) -> bool:
        return self.flags & TYPE == REPLY

    @property
    def wants_reply(self) -> bool:
        return not self.flags & NO_REPLY

    @property
    def failed(self) -> bool:
        """Whether it says that what was asked for was not done."""
        return bool(self.flags & ERROR)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and all(
            getattr(self, name) == getattr(other, name) for name in Message.__slots__
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Message({', '.join(f'{name}={getattr(self, name)!r}' for name in Message.__slots__)})"


def encode(message: Message) -> bytes:
    """What ``decode`` turns into an equal message."""
    body = b""
    if not message.failed:
        table = REPLIES if message.is_reply else REQUESTS
        body = table[Command(message.command)].head.pack(*message.values) + message.tail
    size = HEADER.size + len(body)
    return HEADER.pack(message.number, message.command, size, message.flags, message.error) + body


def missing(data: "bytes | bytearray") -> int:
    """How many bytes to read next: the header first, then the rest. Raises RemoteProtocolError."""
    if len(data) < HEADER.size:
        return HEADER.size - len(data)
    _, command, size, flags, _ = HEADER.unpack_from(data)
    if not HEADER.size <= size <= MAX_SIZE:
        raise RemoteProtocolError(f"a message {command} of {size} bytes")
    if flags & ~FLAGS or flags & TYPE > REPLY:
        raise RemoteProtocolError(f"a message {command} with flags {flags:#x}")
    left: int = size - len(data)
    return max(0, left)


def decode(data: bytes, fds: int) -> Message:
    """A whole message, with which ``fds`` descriptors came. One that nobody knows has no values.

    Raises RemoteProtocolError for what is longer or shorter than its kind can be.
    """
    number, command, size, flags, error = HEADER.unpack_from(data)
    reply = flags & TYPE == REPLY
    layout = (REPLIES if reply else REQUESTS).get(command)
    if reply and flags & ERROR:
        layout = Layout("")
    if layout is None:
        if reply or fds:
            raise RemoteProtocolError(f"a message {command}, which is unknown")
        return Message(command, number=number, flags=flags)
    tail = size - HEADER.size - layout.head.size
    if not 0 <= tail <= layout.tail:
        raise RemoteProtocolError(f"a message {command} of {size} bytes")
    if fds > layout.fds:
        raise RemoteProtocolError(f"a message {command} with {fds} descriptors")
    values = layout.head.unpack_from(data, HEADER.size)
    if layout.counted is not None and values[layout.counted] != tail:
        raise RemoteProtocolError(f"a message {command} of {tail} bytes that says {values[layout.counted]}")
    return Message(
        command, *values, tail=data[HEADER.size + layout.head.size :], number=number, flags=flags, error=error
    )


def capabilities(tail: bytes) -> "dict[str, Any]":
    """What is in the JSON of a VERSION message. Raises RemoteProtocolError where it is none."""
    text = tail.rstrip(b"\0")
    if not text:
        return {}
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"capabilities that are no JSON: {error}") from error
    found = said.get("capabilities", {}) if isinstance(said, dict) else None
    if not isinstance(found, dict):
        raise RemoteProtocolError("capabilities that are no object")
    return found


def number(found: "dict[str, Any]", name: str, default: int, least: int) -> int:
    """A number among capabilities. Raises RemoteProtocolError."""
    value = found.get(name, default)
    if type(value) is not int or not least <= value < 1 << 64:
        raise RemoteProtocolError(f"the capability {name} is {str(value)[:40]}")
    return value

"""The messages of vhost-user, for both roles: bytes in, messages out, and no I/O.

Each role sends requests on a channel of its own and gets replies on the same. ``FRONTEND`` and ``BACKEND``
are the tables of what either may ask; encode, decode and the tests walk them.

Source: vhost-user specification (QEMU, docs/interop/vhost-user.rst)
"""

from enum import IntEnum, IntFlag
from struct import Struct

from pileus.errors import RemoteProtocolError

HEADER = Struct("=III")  # request, flags, bytes of payload
VERSION, VERSION_MASK, REPLY, NEED_REPLY = 0x1, 0x3, 1 << 2, 1 << 3
FLAGS = VERSION_MASK | REPLY | NEED_REPLY
MAX_FDS = 8  # of one message, one for each region of a memory table
MAX_REGIONS = 8
MAX_CONFIG = 256  # bytes of configuration that a message carries
MAX_SHMEM = 256
NO_FD = 1 << 8  # in the number of a vring: no descriptor comes with it
VRING_MASK = 0xFF
PROTOCOL_FEATURES = 1 << 30  # feature bit: there are protocol features, and rings start disabled
LOG_ALL = 1 << 26  # feature bit: writes are marked in the log
LOG_VRING = 1  # flag of SET_VRING_ADDR: so are those to the used ring


class Feature(IntFlag):
    """Protocol features, which the peers agree on beside those of virtio."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    SHMEM = 1 << 20


class Request(IntEnum):
    """What a front-end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """What a back-end asks, on the channel that SET_BACKEND_REQ_FD gave it."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class Payload:
    """A layout: ``head``, of which peers may leave off the end down to ``least`` bytes, and perhaps a tail of
    up to ``most`` items of ``item`` bytes, as many as the head's value ``count`` says.
    """

    __slots__ = ("count", "head", "item", "least", "most")

    def __init__(
        self, layout: str, least: int | None = None, item: int = 0, count: int = 0, most: int = 0
    ) -> None:
        self.head = Struct("=" + layout)
        self.least = self.head.size if least is None else least
        self.item = item
        self.count = count
        self.most = most

    def allows(self, size: int) -> bool:
        """Whether a payload can have ``size`` bytes, as far as that is known before they are there."""
        rest = size - self.head.size
        if self.item and rest > 0:
            return rest % self.item == 0 and rest // self.item <= self.most
        return self.least <= size <= self.head.size


NONE = Payload("")
U64 = Payload("Q")
VRING_STATE = Payload("II")  # index, number
VRING_ADDRESS = Payload("IIQQQQ")  # index, flags, descriptors, used, available (all hva), log (gpa of used)
LOG = Payload("QQ")  # size, offset in the descriptor
REGION = Struct("=QQQQ")  # gpa, size, hva in the front-end, offset in the descriptor
MEM_TABLE = Payload("I4x", item=REGION.size, count=0, most=MAX_REGIONS)  # count
MEM_REGION = Payload("8xQQQQ")  # as REGION
CONFIG = Payload("III", item=1, count=1, most=MAX_CONFIG)  # offset, size, flags
CONFIG_REPLY = Payload("III", least=0, item=1, count=1, most=MAX_CONFIG)  # without bytes: refused
INFLIGHT = Payload("QQHH4x", least=20)  # size, offset in the descriptor, queues, descriptors of each
IOTLB = Payload("QQQBB6x")  # iova, size, hva, permission, type
NOTIFIER = Payload("QQQ")  # index, size, offset
DEVICE_STATE = Payload("II")  # direction, phase
MAP_WRITABLE = 1 << 0  # a flag of SHMEM_MAP
SHMEM_CONFIG = Payload(f"I4x{MAX_SHMEM}Q")  # regions, sizes by id
SHMEM_MAP = Payload("B7xQQQQ")  # region id, offset in the descriptor, offset in the region, size, flags
ACK = Payload("Q", least=0)  # of SET_LOG_BASE, which some leave empty


class Call:
    """A request's payload, its reply's (None: only the one of NEED_REPLY) and the descriptors of both.

    ``fds`` is how many come with the request; VRING: one, unless its NO_FD says none; REGIONS: one for each.
    """

    __slots__ = ("fds", "needs", "payload", "reply", "reply_fds")

    def __init__(
        self,
        payload: Payload = NONE,
        reply: Payload | None = None,
        *,
        fds: "int | tuple[int, ...]" = 0,
        reply_fds: "int | tuple[int, ...]" = 0,
        needs: int = 0,
    ) -> None:
        self.payload = payload
        self.reply = reply
        self.fds = fds
        self.reply_fds = reply_fds
        self.needs = needs  # the protocol feature without which it must not be sent


VRING, REGIONS = -1, -2

FRONTEND: "dict[int, Call]" = {
    Request.GET_FEATURES: Call(reply=U64),
    Request.SET_FEATURES: Call(U64),
    Request.SET_OWNER: Call(),
    Request.RESET_OWNER: Call(),
    Request.SET_MEM_TABLE: Call(MEM_TABLE, fds=REGIONS),
    Request.SET_LOG_BASE: Call(LOG, ACK, fds=1, needs=Feature.LOG_SHMFD),
    Request.SET_LOG_FD: Call(fds=1),
    Request.SET_VRING_NUM: Call(VRING_STATE),
    Request.SET_VRING_ADDR: Call(VRING_ADDRESS),
    Request.SET_VRING_BASE: Call(VRING_STATE),
    Request.GET_VRING_BASE: Call(VRING_STATE, VRING_STATE),
    Request.SET_VRING_KICK: Call(U64, fds=VRING),
    Request.SET_VRING_CALL: Call(U64, fds=VRING),
    Request.SET_VRING_ERR: Call(U64, fds=VRING),
    Request.GET_PROTOCOL_FEATURES: Call(reply=U64),
    Request.SET_PROTOCOL_FEATURES: Call(U64),
    Request.GET_QUEUE_NUM: Call(reply=U64, needs=Feature.MQ),
    Request.SET_VRING_ENABLE: Call(VRING_STATE),
    Request.SEND_RARP: Call(U64, needs=Feature.RARP),
    Request.NET_SET_MTU: Call(U64, needs=Feature.NET_MTU),
    Request.SET_BACKEND_REQ_FD: Call(fds=1, needs=Feature.BACKEND_REQ),
    Request.IOTLB_MSG: Call(IOTLB),
    Request.SET_VRING_ENDIAN: Call(VRING_STATE, needs=Feature.CROSS_ENDIAN),
    Request.GET_CONFIG: Call(CONFIG, CONFIG_REPLY, needs=Feature.CONFIG),
    Request.SET_CONFIG: Call(CONFIG, needs=Feature.CONFIG),
    Request.POSTCOPY_ADVISE: Call(reply=NONE, reply_fds=1, needs=Feature.PAGEFAULT),
    Request.POSTCOPY_LISTEN: Call(needs=Feature.PAGEFAULT),
    Request.POSTCOPY_END: Call(reply=U64, needs=Feature.PAGEFAULT),
    Request.GET_INFLIGHT_FD: Call(INFLIGHT, INFLIGHT, reply_fds=(0, 1), needs=Feature.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Call(INFLIGHT, fds=1, needs=Feature.INFLIGHT_SHMFD),
    Request.RESET_DEVICE: Call(needs=Feature.RESET_DEVICE),
    Request.VRING_KICK: Call(VRING_STATE, needs=Feature.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Call(reply=U64, needs=Feature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Call(MEM_REGION, fds=1, needs=Feature.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Call(MEM_REGION, fds=(0, 1), needs=Feature.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Call(U64, needs=Feature.STATUS),
    Request.GET_STATUS: Call(reply=U64, needs=Feature.STATUS),
    Request.SET_DEVICE_STATE_FD: Call(DEVICE_STATE, U64, fds=1, reply_fds=(0, 1), needs=Feature.DEVICE_STATE),
    Request.CHECK_DEVICE_STATE: Call(reply=U64, needs=Feature.DEVICE_STATE),
    Request.GET_SHMEM_CONFIG: Call(reply=SHMEM_CONFIG, needs=Feature.SHMEM),
}
BACKEND: "dict[int, Call]" = {
    BackendRequest.IOTLB_MSG: Call(IOTLB),
    BackendRequest.CONFIG_CHANGE_MSG: Call(needs=Feature.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Call(NOTIFIER, fds=VRING, needs=Feature.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Call(VRING_STATE, needs=Feature.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Call(VRING_STATE, needs=Feature.INBAND_NOTIFICATIONS),
    BackendRequest.SHMEM_MAP: Call(SHMEM_MAP, fds=1, needs=Feature.SHMEM),
    BackendRequest.SHMEM_UNMAP: Call(SHMEM_MAP, needs=Feature.SHMEM),
}
NAMES = {id(FRONTEND): Request, id(BACKEND): BackendRequest}


class Message:
    """A request or a reply: ``values`` of the payload's head, and ``tail``, the bytes behind it."""

    __slots__ = ("flags", "request", "tail", "values")

    def __init__(self, request: int, *values: int, tail: bytes = b"", flags: int = VERSION) -> None:
        self.request = request
        self.values = values
        self.tail = tail
        self.flags = flags

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return f"Message({self.request!r}, {self.values}, tail={self.tail!r}, flags={self.flags:#x})"

    def _all(self) -> "tuple[object, ...]":
        return self.request, self.values, self.tail, self.flags

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & REPLY)

    @property
    def needs_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY)

    @property
    def regions(self) -> "list[tuple[int, int, int, int]]":
        """Those of a memory table: gpa, size, hva, offset in the descriptor of the same index."""
        return [(gpa, size, hva, offset) for gpa, size, hva, offset in REGION.iter_unpack(self.tail)]


def encode(table: "dict[int, Call]", message: Message) -> bytes:
    """The bytes of ``message``, whose layout is its sender's to keep: struct.error and KeyError are bugs."""
    payload = _layout(table[message.request], message.is_reply)
    data = payload.head.pack(*message.values) + message.tail
    return HEADER.pack(message.request, message.flags, len(data)) + data


def missing(table: "dict[int, Call]", buffer: "bytes | bytearray", reply: bool) -> int:
    """How many bytes the message at the start of ``buffer`` still lacks, or its header first.

    Raises RemoteProtocolError once the header is there and wrong.
    """
    if len(buffer) < HEADER.size:
        return HEADER.size - len(buffer)
    return max(0, HEADER.size + _judge_header(table, buffer, reply) - len(buffer))


def decode(table: "dict[int, Call]", buffer: bytearray, reply: bool) -> "Message | None":
    """Take one message off ``buffer``, a reply if ``reply``; None until it is whole.

    Raises RemoteProtocolError for what the table does not allow.
    """
    if missing(table, buffer, reply):
        return None
    number, flags, size = HEADER.unpack_from(buffer)
    payload = _layout(table[number], reply)
    end = HEADER.size + size
    data = bytes(buffer[HEADER.size : end])
    del buffer[:end]
    values = payload.head.unpack(data[: payload.head.size].ljust(payload.head.size, b"\0"))
    tail = data[payload.head.size :]
    request = NAMES[id(table)](number)
    if payload.item and len(tail) != values[payload.count] * payload.item:
        raise RemoteProtocolError(
            f"{request.name} says {values[payload.count]} of something and holds {len(tail)} bytes of it"
        )
    return Message(request, *values, tail=tail, flags=flags)


def check_fds(table: "dict[int, Call]", message: Message, count: int) -> None:
    """Raise RemoteProtocolError where ``count`` is not how many descriptors come with ``message``."""
    call = table[message.request]
    allowed = call.reply_fds if message.is_reply else call.fds
    if allowed == VRING:
        allowed = 0 if message.values[0] & NO_FD else 1
    elif allowed == REGIONS:
        allowed = message.values[0]
    if count not in (allowed if isinstance(allowed, tuple) else (allowed,)):
        raise RemoteProtocolError(f"{_name(table, message.request)} came with {count} descriptors")


def _judge_header(table: "dict[int, Call]", buffer: "bytes | bytearray", reply: bool) -> int:
    """The size of the payload to come."""
    number, flags, size = HEADER.unpack_from(buffer)
    if flags & VERSION_MASK != VERSION or flags & ~FLAGS:
        raise RemoteProtocolError(f"a header has flags {flags:#x}")
    if number not in table:
        raise RemoteProtocolError(f"there is no request {number}")
    if bool(flags & REPLY) != reply:
        raise RemoteProtocolError(f"{_name(table, number)} is {'no' if reply else 'a'} reply")
    if not _layout(table[number], reply).allows(size):
        raise RemoteProtocolError(f"{_name(table, number)} has a payload of {size} bytes")
    return int(size)


def _layout(call: Call, reply: bool) -> Payload:
    """A request without a reply of its own is answered with a number, 0 for success."""
    return (U64 if call.reply is None else call.reply) if reply else call.payload


def _name(table: "dict[int, Call]", number: int) -> str:
    return NAMES[id(table)](number).name

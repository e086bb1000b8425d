"""Front-ends that keep to no rule: a back-end refuses or parts, and serves the next one."""

import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.errors import PileusError
from pileus.vhost_user import protocol
from pileus.vhost_user.connection import Client, Connection, close_all
from pileus.vhost_user.protocol import FRONTEND, NEED_REPLY, VERSION, Feature, Message, Request
from pileus.virtio.device import VERSION_1

from .serving import Echo, Serving
from .test_backend import ask, driving, front, until

SIZE = 1 << 20
HVA = 1 << 40
ALL = VERSION_1 | protocol.PROTOCOL_FEATURES


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def echo(path: str) -> Iterator[Echo]:
    device = Echo()
    with Serving(device, path):
        yield device


class Stranger:
    """Speaks the protocol, and says in it what it likes."""

    def __init__(self, path: str) -> None:
        sock = Client(path).attempt()
        assert sock is not None
        self.channel = Connection(sock, "the back-end", FRONTEND, asks=True)
        self.memory = os.memfd_create("stranger", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, SIZE)
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        self.channel.close()
        os.close(self.memory)
        os.close(self.eventfd)

    def tell(self, request: Request, *values: int, tail: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Whether it was taken: 0, or what refuses it."""
        self.channel.allow()
        self.channel.send(Message(request, *values, tail=tail, flags=VERSION | NEED_REPLY), fds)
        reply, got = self.channel.receive()
        close_all(got)
        return int(reply.values[0])

    def introduce(self) -> None:
        assert self.tell(Request.SET_FEATURES, ALL) == 0 if self._acked() else True

    def _acked(self) -> bool:
        self.channel.send(Message(Request.SET_PROTOCOL_FEATURES, int(Feature.REPLY_ACK | Feature.MQ)))
        return True

    def share(self) -> int:
        return self.tell(Request.ADD_MEM_REG, 0, SIZE, HVA, 0, fds=(self.memory,))


@pytest.fixture
def stranger(path: str, echo: Echo) -> Iterator[Stranger]:
    stranger = Stranger(path)
    stranger.introduce()
    yield stranger
    stranger.close()


REFUSED = {
    "a feature nobody offered": (Request.SET_FEATURES, ALL | 1 << 60),
    "a protocol feature nobody offered": (Request.SET_PROTOCOL_FEATURES, 1 << 60),
    "a ring that does not exist": (Request.SET_VRING_NUM, 2, 64),
    "a ring of no size": (Request.SET_VRING_NUM, 0, 0),
    "a ring of an odd size": (Request.SET_VRING_NUM, 0, 48),
    "a ring that is too large": (Request.SET_VRING_NUM, 0, 128),
    "the base of a ring that does not exist": (Request.SET_VRING_BASE, 255, 0),
    "a ring without a kick": (Request.SET_VRING_KICK, 0 | protocol.NO_FD),
    "memory that is not there": (Request.REM_MEM_REG, 4096, SIZE, HVA, 0),
    "postcopy": (Request.POSTCOPY_LISTEN,),
}


@pytest.mark.parametrize("message", REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_the_conversation_and_what_was_agreed(
    stranger: Stranger, message: tuple[Request, int]
) -> None:
    assert stranger.share() == 0
    assert stranger.tell(*message) == 1
    assert stranger.tell(Request.SET_VRING_NUM, 0, 64) == 0


REGIONS = {
    "of nothing": (0, 0, HVA, 0),
    "past the end of its file": (0, SIZE + 4096, HVA, 0),
    "behind the end of its file": (0, 4096, HVA, SIZE),
    "past all addresses": ((1 << 64) - 4096, 8192, HVA, 0),
    "past all of the front-end's": (0, 8192, (1 << 64) - 4096, 0),
    "at an offset past all offsets": (0, 8192, HVA, (1 << 64) - 4096),
}


@pytest.mark.parametrize("about", REGIONS.values(), ids=REGIONS)
def test_a_region_that_cannot_be_is_refused(
    stranger: Stranger, about: tuple[int, int, int, int], echo: Echo
) -> None:
    assert stranger.tell(Request.ADD_MEM_REG, *about, fds=(stranger.memory,)) == 1
    tail = protocol.REGION.pack(*about)
    assert stranger.tell(Request.SET_MEM_TABLE, 1, tail=tail, fds=(stranger.memory,)) == 1
    assert stranger.share() == 0


@pytest.mark.parametrize(
    "about", [(0, SIZE, 0, 0), (SIZE - 1, 4096, 0, 0), (1 << 40, SIZE, HVA + SIZE - 1, 0)]
)
def test_regions_that_overlap_are_refused(stranger: Stranger, about: tuple[int, int, int, int]) -> None:
    assert stranger.share() == 0
    assert stranger.tell(Request.ADD_MEM_REG, *about, fds=(stranger.memory,)) == 1


def test_no_more_regions_than_slots_are_taken(stranger: Stranger) -> None:
    for index in range(64):
        about = (index * SIZE, SIZE, HVA + index * SIZE, 0)
        assert stranger.tell(Request.ADD_MEM_REG, *about, fds=(stranger.memory,)) == 0
    assert stranger.tell(Request.ADD_MEM_REG, 1 << 50, SIZE, 1 << 50, 0, fds=(stranger.memory,)) == 1


def test_a_file_that_cannot_be_memory_is_refused(stranger: Stranger) -> None:
    for path, flags in (("/dev/null", os.O_RDWR), ("/proc/self/status", os.O_RDONLY), ("/", os.O_RDONLY)):
        fd = os.open(path, flags)
        assert stranger.tell(Request.ADD_MEM_REG, 0, 4096, HVA, 0, fds=(fd,)) == 1
        os.close(fd)


def test_what_is_no_eventfd_is_none_of_a_ring_s_descriptors(stranger: Stranger) -> None:
    reader, writer = os.pipe()
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        assert stranger.tell(request, 0, fds=(writer,)) == 1
        assert stranger.tell(request, 0, fds=(stranger.eventfd,)) == 0
    os.close(reader)
    os.close(writer)


ADDRESSES = {
    "outside of memory": (HVA + SIZE, HVA, HVA),
    "at the end of memory": (HVA + SIZE - 16, HVA, HVA),
    "before memory": (HVA - 16, HVA, HVA),
    "not aligned": (HVA + 8, HVA, HVA),
    "wrapping": ((1 << 64) - 16, HVA, HVA),
    "as the guest sees them": (0x1000, 0x2000, 0x3000),
}


@pytest.mark.parametrize("addresses", ADDRESSES.values(), ids=ADDRESSES)
def test_a_ring_that_is_no_memory_does_not_start(
    stranger: Stranger, addresses: tuple[int, int, int], echo: Echo
) -> None:
    assert stranger.share() == 0
    assert stranger.tell(Request.SET_VRING_NUM, 0, 64) == 0
    assert stranger.tell(Request.SET_VRING_ADDR, 0, 0, *addresses, 0) == 0
    assert stranger.tell(Request.SET_VRING_KICK, 0, fds=(stranger.eventfd,)) == 0
    assert stranger.tell(Request.SET_VRING_ENABLE, 0, 1) == 1
    assert echo.memory is None


def start(stranger: Stranger, index: int = 0) -> None:
    """A ring that is served."""
    assert stranger.share() == 0
    assert stranger.tell(Request.SET_VRING_NUM, index, 64) == 0
    assert stranger.tell(Request.SET_VRING_ADDR, index, 0, HVA, HVA + 0x1000, HVA + 0x2000, 0) == 0
    assert stranger.tell(Request.SET_VRING_KICK, index, fds=(stranger.eventfd,)) == 0
    assert stranger.tell(Request.SET_VRING_ENABLE, index, 1) == 0


def test_what_must_not_change_about_a_served_ring_does_not(stranger: Stranger, echo: Echo) -> None:
    start(stranger)
    assert stranger.tell(Request.SET_VRING_NUM, 0, 32) == 1
    assert stranger.tell(Request.SET_VRING_BASE, 0, 5) == 1
    assert stranger.tell(Request.SET_VRING_ADDR, 0, 0, HVA, HVA, HVA, 0) == 1
    assert stranger.tell(Request.SET_FEATURES, ALL | 1 << 28) == 1
    assert echo.queues[0].active


def test_a_ring_whose_memory_is_taken_away_stops(stranger: Stranger, echo: Echo) -> None:
    start(stranger)
    assert stranger.tell(Request.REM_MEM_REG, 0, SIZE, HVA, 0) == 0
    assert not echo.queues[0].active
    assert stranger.share() == 0


def test_memory_may_change_under_a_served_ring(stranger: Stranger, echo: Echo) -> None:
    start(stranger)
    about = protocol.REGION.pack(0, SIZE, HVA, 0)
    for _ in range(5):
        assert stranger.tell(Request.SET_MEM_TABLE, 1, tail=about, fds=(stranger.memory,)) == 0
        assert echo.queues[0].active


def test_an_available_index_from_nowhere_stops_the_device_alone(
    path: str, stranger: Stranger, echo: Echo
) -> None:
    start(stranger)
    err = os.eventfd(0, os.EFD_NONBLOCK)
    assert stranger.tell(Request.SET_VRING_ERR, 0, fds=(err,)) == 0
    os.pwrite(stranger.memory, struct.pack("<H", 1000), 0x2002)
    os.eventfd_write(stranger.eventfd, 1)
    until(lambda: echo.failed)
    until(lambda: readable(err))
    os.close(err)
    stranger.channel.close()
    with driving(front(path)) as driver:
        assert ask(driver, b"next") == b"NEXT"


def test_eventfds_that_block_hold_nobody_for_longer_than_their_owner_lives(
    path: str, stranger: Stranger, echo: Echo
) -> None:
    call = os.eventfd((1 << 32) - 1)
    os.eventfd_write(call, (1 << 64) - 2 - ((1 << 32) - 1))
    start(stranger)
    assert stranger.tell(Request.SET_VRING_CALL, 0, fds=(call,)) == 0
    os.set_blocking(stranger.eventfd, True)
    stranger.channel.close()
    os.close(call)
    with driving(front(path)) as driver:
        assert ask(driver, b"next") == b"NEXT"


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


INFLIGHT = {
    "too small for its queues": (64, 0, 2, 64),
    "larger than its file": (8 << 20, 0, 2, 64),
    "behind its file": (8192, SIZE, 2, 64),
    "of too much": (1 << 40, 0, 2, 64),
    "of nothing": (0, 0, 0, 0),
}


@pytest.mark.parametrize("about", INFLIGHT.values(), ids=INFLIGHT)
def test_an_inflight_region_that_cannot_be_is_refused(
    stranger: Stranger, about: tuple[int, int, int, int]
) -> None:
    assert stranger.tell(Request.SET_INFLIGHT_FD, *about, fds=(stranger.memory,)) == 1
    assert stranger.tell(Request.SET_INFLIGHT_FD, 8192, 0, 2, 64, fds=(stranger.memory,)) == 0


def test_a_log_that_is_truncated_harms_nobody(path: str, stranger: Stranger, echo: Echo) -> None:
    start(stranger)
    log = os.memfd_create("log")
    os.ftruncate(log, 4096)
    stranger.tell(Request.SET_LOG_BASE, 4096, 0, fds=(log,))
    assert stranger.tell(Request.SET_FEATURES, ALL | protocol.LOG_ALL) == 0
    os.ftruncate(log, 0)
    os.pwrite(stranger.memory, struct.pack("<QIHH", 0x3000, 64, 2, 0), 0)
    os.pwrite(stranger.memory, struct.pack("<HH", 1, 0), 0x2002)
    os.eventfd_write(stranger.eventfd, 1)
    time.sleep(0.1)
    stranger.channel.close()
    os.close(log)
    with driving(front(path)) as driver:
        assert ask(driver, b"next") == b"NEXT"


def test_no_descriptor_stays_open_whatever_comes(path: str, echo: Echo) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    until(lambda: echo.memory is None)
    before = count()
    for _ in range(5):
        stranger = Stranger(path)
        stranger.introduce()
        start(stranger)
        stranger.tell(Request.ADD_MEM_REG, 0, SIZE, HVA, 0, fds=(stranger.memory,))
        stranger.tell(Request.SET_INFLIGHT_FD, 64, 0, 2, 64, fds=(stranger.memory,))
        stranger.tell(Request.SET_VRING_KICK, 9, fds=(stranger.eventfd,))
        stranger.tell(Request.SET_VRING_ERR, 0, fds=(stranger.eventfd,))
        stranger.close()
        until(lambda: echo.memory is None)
    until(lambda: count() <= before)


# -- whatever comes to somebody's mind ------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 64, 255, 256, 4096, HVA, HVA + 4096, SIZE, 1 << 30, 1 << 63, (1 << 64) - 1]
)
COUNTS = st.integers(0, 3)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, int]:
    """Bytes of a message, perhaps well-formed, and how many descriptors go with it."""
    request = draw(st.sampled_from(list(Request)))
    call = FRONTEND[request]
    head = call.payload.head
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=64)), draw(COUNTS)
    data = b"".join(draw(NUMBERS).to_bytes(8, "little") for _ in range(head.size // 8 + 1))[: head.size]
    if head.size % 8 == 0 and head.size == 8 and draw(st.booleans()):
        data = struct.pack("=II", draw(st.integers(0, 2)), draw(st.sampled_from([0, 1, 64])))
    flags = draw(st.sampled_from([1, 9, 9, 9, 0, 5]))
    size = draw(st.sampled_from([len(data)] * 8 + [0, 4096, 1 << 31]))
    allowed = call.fds if isinstance(call.fds, int) and call.fds >= 0 else 1
    return struct.pack("=III", request, flags, size) + data, draw(st.sampled_from([allowed] * 4 + [0, 2]))


@settings(max_examples=60)
@given(st.lists(messages(), min_size=1, max_size=12), st.integers(0, 1 << 32))
def test_no_messages_end_the_back_end(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[bytes, int]], seed: int
) -> None:
    path, echo = str(tmp_path_factory.mktemp("hostile") / "s"), Echo()
    chance = random.Random(seed)
    with Serving(echo, path):
        stranger = Stranger(path)
        try:
            stranger.introduce()
            if chance.random() < 0.5:
                start(stranger)
                os.pwrite(stranger.memory, chance.randbytes(0x4000), 0)
                os.eventfd_write(stranger.eventfd, 1)
            kinds = [stranger.memory, stranger.eventfd]
            sock = stranger.channel._socket
            sock.settimeout(1)
            for data, count in wanted:
                socket.send_fds(sock, [data], [chance.choice(kinds) for _ in range(count)])
                if chance.random() < 0.1:
                    os.ftruncate(stranger.memory, chance.choice([0, 4096, SIZE]))
        except (OSError, PileusError):
            pass  # it has parted
        finally:
            stranger.close()
        with driving(front(path)) as driver:
            assert ask(driver, b"next") == b"NEXT"

"""A device in Python is served as the protocol has it, and no client can do it more harm than its own."""

import errno
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.errors import PileusError
from pileus.pci.config_space import COMMAND, INTX_DISABLE
from pileus.vfio import abi
from pileus.vfio_user.connection import close_all
from pileus.vfio_user.device import Bar, PciDevice, pieces
from pileus.vfio_user.devices.copy_engine import (
    COUNT,
    DONE,
    DOORBELL,
    FAILED,
    LENGTH,
    SOURCE,
    STATUS,
    TARGET,
    CopyEngine,
)
from pileus.vfio_user.protocol import NO_REPLY, REQUESTS, Command, Message
from pileus.vfio_user.server import Server

from .harness import BareClient, Served, open_fds, raw

MIB = 1 << 20
BOTH = abi.DMA_READ | abi.DMA_WRITE
TRIGGER = abi.DATA_EVENTFD | abi.ACTION_TRIGGER


@pytest.fixture
def engine() -> Iterator[CopyEngine]:
    engine = CopyEngine()
    yield engine
    engine.close()


@pytest.fixture
def served(engine: CopyEngine) -> Iterator[Served]:
    served = Served(engine)
    yield served
    served.close()


@pytest.fixture
def client(served: Served) -> BareClient:
    client = BareClient(served.sock)
    client.greet()
    return client


def memfd(size: int) -> int:
    fd = os.memfd_create("client", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def dma_map(
    client: BareClient, fd: int | None, iova: int, size: int, flags: int = BOTH, offset: int = 0
) -> int:
    request = Message(Command.DMA_MAP, 32, flags, offset, iova, size)
    return client.ask(request, [] if fd is None else [fd])[0].error


def eventfd(client: BareClient, kind: int, number: int) -> int:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    reply, _ = client.ask(Message(Command.DEVICE_SET_IRQS, 20, TRIGGER, kind, number, 1), [fd])
    assert not reply.failed
    return fd


def start_copy(client: BareClient, source: int, target: int, length: int) -> None:
    client.write(0, SOURCE, 8, source)
    client.write(0, TARGET, 8, target)
    client.write(0, LENGTH, 4, length)
    client.write(0, DOORBELL, 4, 1)


def test_both_ends_agree_on_a_version_and_limits(served: Served) -> None:
    reply = BareClient(served.sock).greet(b'{"capabilities": {"max_msg_fds": 8, "unheard_of": [1]}}\0')
    assert reply.values == (0, 0)
    assert json.loads(reply.tail.rstrip(b"\0"))["capabilities"] == {
        "max_msg_fds": 16,
        "max_data_xfer_size": MIB,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
    }


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("=HH", 1, 0),
        struct.pack("=HH", 0, 1) + b"{",
        struct.pack("=HH", 0, 1) + b"[]",
        struct.pack("=HH", 0, 1) + b'{"capabilities": 5}',
        struct.pack("=HH", 0, 1) + b'{"capabilities": {"max_data_xfer_size": "much"}}',
        struct.pack("=HH", 0, 1) + b'{"capabilities": {"max_data_xfer_size": 0}}',
        struct.pack("=HH", 0, 1) + b"[" * 4000,
        b"",
    ],
)
def test_a_client_that_begins_badly_is_hung_up_on(served: Served, payload: bytes) -> None:
    served.sock.sendall(raw(Command.VERSION, payload))
    assert served.sock.recv(1) == b""
    served.join()


def test_a_client_that_does_not_begin_or_begins_twice_is_hung_up_on(engine: CopyEngine) -> None:
    for before in (False, True):
        served = Served(engine)
        client = BareClient(served.sock)
        if before:
            client.greet()
        request = Message(Command.VERSION, 0, 1) if before else Message(Command.DEVICE_RESET)
        with pytest.raises(PileusError):
            client.ask(request)
        served.close()


def test_it_is_a_pci_device_with_its_regions_and_interrupts(client: BareClient) -> None:
    info, _ = client.ask(Message(Command.DEVICE_GET_INFO, 16, 0, 0, 0))
    assert info.values[1:] == (abi.DEVICE_RESET | abi.DEVICE_PCI, 9, 5)
    sizes, mapped = [], []
    for index in range(9):
        reply, fds = client.ask(Message(Command.DEVICE_GET_REGION_INFO, 32, 0, index, 0, 0, 0))
        region = abi.decode_region(index, abi.REGION_INFO.pack(*reply.values))
        sizes.append(region.size)
        mapped.append((region.areas, len(fds)))
        close_all(fds)
    assert sizes == [4096, 0, 4096, 0, 0, 4096, 0, 256, 0]
    assert [index for index, each in enumerate(mapped) if each == ([(0, 4096)], 1)] == [2]
    counts = [
        client.ask(Message(Command.DEVICE_GET_IRQ_INFO, 16, 0, kind, 0))[0].values[3] for kind in range(5)
    ]
    assert counts == [1, 0, 2, 0, 0]
    for command, values in (
        (Command.DEVICE_GET_REGION_INFO, (32, 0, 9, 0, 0, 0)),
        (Command.DEVICE_GET_IRQ_INFO, (16, 0, 5, 0)),
        (Command.DEVICE_GET_REGION_IO_FDS, (16, 0, 99, 0)),
    ):
        assert client.ask(Message(command, *values))[0].error == errno.EINVAL
    assert client.ask(Message(Command.DEVICE_GET_REGION_IO_FDS, 16, 0, 0, 0))[0].values[3] == 0


def test_configuration_space_is_a_device_s_own(client: BareClient) -> None:
    assert client.read(7, 0, 4) == 0x10F71AF4
    assert client.read(7, 0x3D, 1) == 1
    assert client.read(7, 0x40, 1) == 0x11
    for bar, low in ((0x10, 0xFFFFF004), (0x18, 0xFFFFF00C), (0x24, 0xFFFFF000)):
        client.write(7, bar, 4, 0xFFFFFFFF)
        assert client.read(7, bar, 4) == low
    assert client.read(7, 0, 256) & 0xFFFF == 0x1AF4


@pytest.mark.parametrize("with_file", [True, False], ids=["mapped", "by messages"])
def test_it_copies_memory_and_interrupts(served: Served, client: BareClient, with_file: bool) -> None:
    fd = memfd(2 * MIB)
    os.pwrite(fd, b"payload!" * 4, 4096)
    done = eventfd(client, abi.MSIX, 0)
    if with_file:
        assert dma_map(client, fd, 0x10000, 2 * MIB) == 0
        start_copy(client, 0x11000, 0x10000 + MIB, 32)
    else:
        assert dma_map(client, None, 0x10000, 2 * MIB) == 0
        for offset, count, value in ((SOURCE, 8, 0x11000), (TARGET, 8, 0x110000), (LENGTH, 4, 32)):
            client.write(0, offset, count, value)
        client.connection.send(Message(Command.REGION_WRITE, DOORBELL, 0, 4, tail=bytes(4), number=99))
        client.connection.send(Message(Command.REGION_READ, 0, 7, 4, number=100))  # one may ask meanwhile
        asked, _ = client.connection.receive()
        assert (asked.command, asked.values) == (Command.DMA_READ, (0x11000, 32))
        data = os.pread(fd, 32, 4096)
        answer = Message(Command.DMA_READ, 0x11000, 32, tail=data, number=asked.number, flags=1)
        client.connection.send(answer)
        asked, _ = client.connection.receive()
        assert (asked.command, asked.values) == (Command.DMA_WRITE, (0x110000, 32))
        os.pwrite(fd, asked.tail, MIB)
        client.connection.send(Message(Command.DMA_WRITE, 0x110000, 32, number=asked.number, flags=1))
        assert [client.connection.receive()[0].number for _ in range(2)] == [99, 100]
    assert os.pread(fd, 32, MIB) == b"payload!" * 4
    assert client.read(0, STATUS, 4) == DONE
    assert client.read(0, COUNT, 4) == 1
    assert os.eventfd_read(done) == 1
    close_all([fd, done])


def test_a_twin_socket_carries_what_the_server_asks(served: Served) -> None:
    client = BareClient(served.sock)
    reply, fds = client.ask(
        Message(Command.VERSION, 0, 1, tail=b'{"capabilities": {"twin_socket": {"supported": true}}}\0')
    )
    said = json.loads(reply.tail.rstrip(b"\0"))["capabilities"]["twin_socket"]
    assert said == {"supported": True, "fd_index": 0}
    twin = BareClient(socket.socket(fileno=fds[0])).connection
    assert dma_map(client, None, 0, MIB) == 0
    client.write(0, LENGTH, 4, 8)
    client.connection.send(Message(Command.REGION_WRITE, DOORBELL, 0, 4, tail=bytes(4)))
    asked, _ = twin.receive()
    twin.send(Message(asked.command, number=asked.number, flags=0x21, error=errno.EFAULT))
    assert client.connection.receive()[0].failed is False
    assert client.read(0, STATUS, 4) == FAILED
    twin.close()


@pytest.mark.parametrize(
    ("iova", "size", "flags", "offset", "error"),
    [
        (0x10000, MIB, BOTH, 0, errno.EEXIST),
        (0x10000 + MIB - 1, 4096, BOTH, 0, errno.EEXIST),
        (0, 0x10001, BOTH, 0, errno.EEXIST),
        (1 << 40, 0, BOTH, 0, errno.EINVAL),
        ((1 << 64) - 4096, 8192, BOTH, 0, errno.EINVAL),
        (1 << 40, 2 * MIB, BOTH, 0, errno.EINVAL),  # more than the file has
        (1 << 40, 4096, BOTH, MIB, errno.EINVAL),
        (1 << 40, 4096, BOTH, 1, errno.EINVAL),
        (1 << 40, 4096, BOTH, (1 << 64) - 4096, errno.EINVAL),
        (1 << 40, 4096, 4, 0, errno.EINVAL),
    ],
)
def test_memory_that_cannot_be_is_refused(
    client: BareClient, engine: CopyEngine, iova: int, size: int, flags: int, offset: int, error: int
) -> None:
    fd = memfd(MIB)
    assert dma_map(client, fd, 0x10000, MIB) == 0
    before = open_fds()
    assert dma_map(client, fd, iova, size, flags, offset) == error
    assert open_fds() == before
    assert engine.dma.windows == [(0x10000, MIB)]
    os.close(fd)


def test_memory_is_given_up_as_it_was_given(client: BareClient, engine: CopyEngine) -> None:
    fd = memfd(MIB)
    before = open_fds()
    dma_map(client, fd, 0, MIB)
    for size, error in ((4096, errno.ENOENT), (MIB, 0), (MIB, errno.ENOENT)):
        assert client.ask(Message(Command.DMA_UNMAP, 24, 0, 0, size))[0].error == error
    assert client.ask(Message(Command.DMA_UNMAP, 24, 1, 0, MIB))[0].error == errno.EINVAL
    assert engine.dma.windows == []
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize("flags", [0, abi.DMA_READ, abi.DMA_WRITE])
def test_memory_is_used_as_the_client_allows(client: BareClient, flags: int) -> None:
    fd = memfd(MIB)
    if flags:
        assert dma_map(client, fd, 0, MIB, flags) == 0
    start_copy(client, 0, 4096, 16)
    assert client.read(0, STATUS, 4) == FAILED
    os.close(fd)


def test_the_pin_is_up_until_the_driver_says_enough(client: BareClient, engine: CopyEngine) -> None:
    pin = eventfd(client, abi.INTX, 0)
    start_copy(client, 0, 0, 0)
    assert os.eventfd_read(pin) == 1
    unmask = Message(Command.DEVICE_SET_IRQS, 20, abi.DATA_NONE | abi.ACTION_UNMASK, abi.INTX, 0, 1)
    client.ask(unmask)
    assert os.eventfd_read(pin) == 1  # it is still up
    client.write(0, STATUS, 4, 0)
    client.ask(unmask)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(pin)
    os.close(pin)


def test_a_pin_that_is_turned_off_is_silent_until_it_is_on_again(client: BareClient) -> None:
    pin = eventfd(client, abi.INTX, 0)
    start_copy(client, 0, 0, 0)
    assert os.eventfd_read(pin) == 1
    unmask = Message(Command.DEVICE_SET_IRQS, 20, abi.DATA_NONE | abi.ACTION_UNMASK, abi.INTX, 0, 1)
    client.write(abi.CONFIG, COMMAND, 2, INTX_DISABLE)
    client.ask(unmask)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(pin)
    client.write(abi.CONFIG, COMMAND, 2, 0)
    assert os.eventfd_read(pin) == 1
    os.close(pin)


@pytest.mark.parametrize(
    ("flags", "kind", "start", "count", "data", "fds"),
    [
        (TRIGGER, abi.MSIX, 1, 2, b"", 2),
        (TRIGGER, abi.MSIX, 0xFFFFFFFF, 2, b"", 2),
        (TRIGGER, abi.MSIX, 0, 2, b"", 1),
        (TRIGGER, abi.MSI, 0, 1, b"", 1),
        (TRIGGER, 77, 0, 0, b"", 0),
        (abi.DATA_NONE | abi.ACTION_TRIGGER, abi.MSIX, 0, 1, b"", 1),
        (abi.DATA_BOOL | abi.ACTION_TRIGGER, abi.MSIX, 0, 2, b"\1", 0),
        (abi.DATA_NONE | abi.ACTION_MASK, abi.MSIX, 0, 1, b"", 0),
        (abi.DATA_EVENTFD | abi.ACTION_UNMASK, abi.INTX, 0, 1, b"", 1),
        (abi.DATA, abi.MSIX, 0, 1, b"", 0),
        (0x1000 | TRIGGER, abi.MSIX, 0, 1, b"", 1),
        (0, 0, 0, 0, b"", 0),
    ],
)
def test_interrupts_that_are_not_there_are_refused(
    client: BareClient, flags: int, kind: int, start: int, count: int, data: bytes, fds: int
) -> None:
    numbers = [os.eventfd(0) for _ in range(fds)]
    before = open_fds()
    request = Message(Command.DEVICE_SET_IRQS, 20, flags, kind, start, count, tail=data)
    assert client.ask(request, numbers)[0].error == errno.EINVAL
    assert open_fds() == before
    close_all(numbers)


def test_a_client_may_trigger_and_disable_interrupts(client: BareClient) -> None:
    fds = [eventfd(client, abi.MSIX, number) for number in range(2)]
    trigger = abi.DATA_BOOL | abi.ACTION_TRIGGER
    client.ask(Message(Command.DEVICE_SET_IRQS, 22, trigger, abi.MSIX, 0, 2, tail=b"\0\1"))
    assert os.eventfd_read(fds[1]) == 1
    client.ask(Message(Command.DEVICE_SET_IRQS, 20, abi.DATA_NONE | abi.ACTION_TRIGGER, abi.MSIX, 0, 0))
    client.ask(Message(Command.DEVICE_SET_IRQS, 22, trigger, abi.MSIX, 0, 2, tail=b"\1\1"))
    for fd in fds:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    close_all(fds)


def test_reset_and_posted_writes(client: BareClient) -> None:
    client.connection.send(Message(Command.REGION_WRITE, SOURCE, 0, 8, tail=bytes(range(8)), flags=NO_REPLY))
    assert client.read(0, SOURCE, 8) == int.from_bytes(bytes(range(8)), "little")
    assert client.ask(Message(Command.DEVICE_RESET))[0].failed is False
    assert client.read(0, SOURCE, 8) == 0


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, 4096, 1),
        (0, 4095, 2),
        (0, 0, 8192),
        (1, 0, 1),
        (6, 0, 1),
        (9, 0, 1),
        (7, 255, 2),
        (0, 1 << 63, 4),
        (0, 0, 0),
    ],
)
def test_accesses_outside_of_regions_are_refused(
    client: BareClient, region: int, offset: int, count: int
) -> None:
    read = Message(Command.REGION_READ, offset, region, count)
    assert client.ask(read)[0].error == errno.EINVAL
    write = Message(Command.REGION_WRITE, offset, region, count, tail=bytes(count))
    assert client.ask(write)[0].error == errno.EINVAL


def test_what_nobody_knows_is_not_supported(client: BareClient) -> None:
    client.connection._socket.sendall(raw(15, bytes(100)))
    reply, _ = client.connection.receive()
    assert (reply.failed, reply.error) == (True, errno.ENOTSUP)
    assert client.ask(Message(Command.DMA_READ, 0, 1))[0].error == errno.ENOTSUP


def test_a_device_outlives_its_clients(engine: CopyEngine) -> None:
    before = open_fds()
    fd = memfd(MIB)
    for round_ in range(3):
        served = Served(engine)
        client = BareClient(served.sock)
        client.greet()
        assert client.read(0, COUNT, 4) == round_
        assert dma_map(client, fd, 0, MIB) == 0
        os.close(eventfd(client, abi.MSIX, 1))
        start_copy(client, 0, 64, 16)
        served.close()
        assert engine.dma.windows == []
    os.close(fd)
    assert open_fds() == before


def test_a_server_listens_at_a_path(tmp_path: Path, engine: CopyEngine) -> None:
    server = Server(str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "socket"))
        sock.sendall(raw(99, b""))
        server.serve_one(engine)
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_a_device_may_have_many_vectors_and_any_bars() -> None:
    class Wide(PciDevice):
        vectors = 2048
        bars = {0: Bar(4096, wide=False), 1: Bar(1 << 30)}  # noqa: RUF012

    device = Wide()
    assert [device.region(index).size for index in range(6)] == [4096, 1 << 30, 0, 0, 0, 65536]
    assert device.config.get(0x42, 2) == 2047
    device.close()
    with pytest.raises(ValueError, match="power of two"):
        Bar(5000)


@given(st.integers(0, 100), st.integers(0, 100))
def test_an_access_is_cut_where_it_must_be(offset: int, count: int) -> None:
    cut = pieces(offset, count)
    assert [at for start, size in cut for at in range(start, start + size)] == list(
        range(offset, offset + count)
    )
    assert all(start % size == 0 and size in (1, 2, 4, 8) for start, size in cut)


U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1)
SMALL = st.integers(0, 10)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, int]:
    """A message of some command, mostly whole, with any numbers in it; and how many descriptors come."""
    command = draw(st.one_of(st.sampled_from(list(REQUESTS)), st.integers(0, 20)))
    layout = REQUESTS.get(command)  # type: ignore[call-overload]
    body = b""
    if layout is not None:
        formats = layout.head.format.lstrip("=")
        kinds = {"H": U16, "I": st.one_of(SMALL, st.integers(0, 64), U32), "Q": st.one_of(SMALL, U64)}
        tail = draw(st.binary(max_size=40)) if layout.tail else b""
        values = [draw(kinds[each]) for each in formats]
        if layout.counted is not None:
            values[layout.counted] = len(tail)
        body = layout.head.pack(*values) + tail
    if draw(st.integers(0, 9)) == 0:
        body += draw(st.binary(min_size=1, max_size=8))
    flags = draw(st.sampled_from([0, 0, 0, NO_REPLY, 1, 2, 0x21, 0x100]))
    return raw(command, body, flags), draw(st.sampled_from([0, 0, 0, 1, 2, 16]))


@settings(max_examples=80, deadline=None)
@given(st.booleans(), st.lists(requests(), max_size=12))
def test_whatever_a_client_sends_the_server_lives_and_nothing_is_left_open(
    greeted: bool, sent: list[tuple[bytes, int]]
) -> None:
    before = open_fds()
    engine = CopyEngine()
    served = Served(engine)
    try:
        if greeted:
            BareClient(served.sock).greet()
        for data, fds in sent:
            numbers = [memfd(8192) for _ in range(fds)]
            try:
                socket.send_fds(served.sock, [data], numbers)
            finally:
                close_all(numbers)
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        served.close()
        engine.close()
    assert open_fds() == before

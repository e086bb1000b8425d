"""A device of another process is a function of the guest's; a server that dies or lies costs only that."""

import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus import log
from pileus.bus import Bus
from pileus.errors import ConfigError, HostError, PileusError, RemoteProtocolError
from pileus.memory import GuestMemory
from pileus.pci.allocator import Window
from pileus.pci.bus import PciBus
from pileus.testing.memory import make_memory
from pileus.vfio.function import PassThrough
from pileus.vfio_user import client as client_module
from pileus.vfio_user.client import Client, connect
from pileus.vfio_user.connection import Connection, close_all
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
from pileus.vfio_user.protocol import ERROR, REPLY, Command, Message
from tests.unit.pci.conftest import FakeRoutes
from tests.unit.vfio.conftest import FakeVm

from .harness import Served, open_fds, raw

MIB = 1 << 20
LOW, HIGH = 0xC0000000, 0x10_0000_0000
ONES = 0xFFFFFFFF
DEVFN, MSIX = 8, 0x40
ADDRESS, DATA = 0xFEE00000, 0x31


@pytest.fixture(params=[True, False], ids=["shared memory", "private memory"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    with make_memory([(0, 2 * MIB), (1 << 32, MIB)], shared=request.param) as memory:
        yield memory


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(log, "error", said.append)
    monkeypatch.setattr(log, "limited", lambda _level, message: said.append(message))
    return said


class Guest:
    """A bus with the function of a client in slot 1, and what a driver would do."""

    def __init__(self, sock: socket.socket, memory: GuestMemory) -> None:
        self.vm, self.routes = FakeVm(), FakeRoutes()
        self.client = Client(sock, "copier", memory)
        self.mmio = Bus("mmio")
        self.bus = PciBus(self.mmio, Window(LOW, 0x1000_0000), Window(HIGH, 0x1000_0000))
        self.function = PassThrough(self.client, self.routes, self.vm, self.vm, self.vm, 16)
        self.bus.add(self.function, slot=1)
        self.function.placed(lambda: self.bus.decode(self.function))

    def read(self, register: int, size: int = 4) -> int:
        return self.bus.read(DEVFN, register, size)

    def write(self, register: int, size: int, value: int) -> None:
        self.bus.write(DEVFN, register, size, value)

    def bar(self, index: int) -> int:
        """Where it is, its size found as drivers do."""
        register = 0x10 + 4 * index
        before = self.read(register)
        wide = before & 4
        high = self.read(register + 4) << 32 if wide else 0
        self.write(register, 4, ONES)
        assert self.read(register) & ~0xF == -4096 & ONES
        self.write(register, 4, before)
        return before & ~0xF | high

    def copy(self, source: int, target: int, length: int) -> int:
        engine = self.bar(0)
        self.write(4, 2, 6)
        self.mmio.store(engine + SOURCE, 8, source)
        self.mmio.store(engine + TARGET, 8, target)
        self.mmio.store(engine + LENGTH, 4, length)
        self.mmio.store(engine + DOORBELL, 4, 1)
        return self.mmio.load(engine + STATUS, 4)

    def use_messages(self) -> None:
        self.write(4, 2, 6)
        table = self.bar(5)
        for vector in range(2):
            for at, value in ((0, ADDRESS), (4, 0), (8, DATA + vector), (12, 0)):
                self.mmio.store(table + 16 * vector + at, 4, value)
        self.write(MSIX + 2, 2, 0x8000)

    def close(self) -> None:
        self.function.close()
        assert (self.vm.pins, self.vm.slots, self.vm.watched, self.routes.given) == ({}, {}, {}, set())


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
def guest(served: Served, memory: GuestMemory) -> Iterator[Guest]:
    guest = Guest(served.sock, memory)
    yield guest
    guest.close()


def test_a_driver_finds_the_engine_and_has_memory_copied(guest: Guest, memory: GuestMemory) -> None:
    assert guest.read(0) == 0x10F71AF4
    assert guest.read(8) >> 8 == 0x088000
    data = os.urandom(300_000)
    memory.write(0x1000, data)
    guest.use_messages()
    assert guest.copy(0x1000, (1 << 32) + 5, len(data)) == DONE
    assert memory.read((1 << 32) + 5, len(data)) == data
    assert guest.routes.delivered() == [(ADDRESS, DATA)]
    assert guest.copy(0x1000, 3 * MIB, 16) == FAILED
    assert guest.routes.delivered() == [(ADDRESS, DATA + 1)]
    assert guest.mmio.load(guest.bar(0) + COUNT, 4) == 2


def test_vectors_wait_while_they_are_masked(guest: Guest) -> None:
    guest.use_messages()
    table = guest.bar(5)
    guest.mmio.store(table + 12, 4, 1)
    guest.copy(0, 64, 16)
    assert guest.routes.delivered() == []
    assert guest.mmio.load(table + 32, 8) == 1
    guest.mmio.store(table + 12, 4, 0)
    assert guest.routes.delivered() == [(ADDRESS, DATA)]


def test_the_pin_is_raised_until_the_driver_looked(guest: Guest) -> None:
    ((fd, (gsi, resample)),) = guest.vm.pins.items()
    assert gsi == 16
    assert resample is not None
    guest.copy(0, 64, 16)
    assert os.eventfd_read(fd) == 1
    resampled = guest.vm.watched[resample]
    assert callable(resampled)
    for expected in (True, False):
        if not expected:
            guest.mmio.store(guest.bar(0) + STATUS, 4, 0)
        os.eventfd_write(resample, 1)
        resampled(1)
        if expected:
            assert os.eventfd_read(fd) == 1  # nobody looked yet
        else:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)


def test_memory_of_the_device_is_the_guest_s_without_messages(guest: Guest, engine: CopyEngine) -> None:
    guest.write(4, 2, 2)
    ((slot, (gpa, size)),) = guest.vm.slots.items()
    assert (gpa, size) == (guest.bar(2), 4096)
    memoryview(guest.vm.regions[slot])[100:104] = b"mine"
    assert engine.shared[2].memory[100:104] == b"mine"
    assert guest.mmio.load(gpa + 100, 4) == int.from_bytes(b"mine", "little")


def test_a_new_client_finds_the_device_reset(engine: CopyEngine) -> None:
    before = open_fds()
    with make_memory([(0, MIB)], shared=True) as memory:
        for _ in range(2):
            served = Served(engine)
            guest = Guest(served.sock, memory)
            assert guest.mmio.load(guest.bar(0) + COUNT, 4) == ONES  # not enabled
            assert guest.copy(0, 4096, 64) == DONE
            assert guest.mmio.load(guest.bar(0) + COUNT, 4) == 1
            guest.close()
            served.join()
            assert engine.dma.windows == []
    assert open_fds() == before


def test_a_server_that_dies_leaves_ones_and_an_error(
    served: Served, memory: GuestMemory, messages: list[str]
) -> None:
    guest = Guest(served.sock.dup(), memory)
    guest.use_messages()
    base = guest.bar(0)
    served.sock.shutdown(socket.SHUT_RDWR)
    served.join()
    assert guest.mmio.load(base + STATUS, 4) == ONES
    assert guest.mmio.load(base, 8) == (1 << 64) - 1
    guest.mmio.store(base + DOORBELL, 4, 1)
    assert guest.read(6, 2) | 0x10 == 0xFFFF  # status is the device's
    guest.write(MSIX + 2, 2, 0)
    guest.write(4, 2, 0)
    guest.function.reset()
    guest.close()
    assert len([message for message in messages if "does not answer" in message]) == 1
    assert [message for message in messages if "server" in message and "from now on" not in message] == []


def test_a_server_that_hangs_is_left(
    memory: GuestMemory, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(CopyEngine):
        def read(self, bar: int, offset: int, size: int) -> int:
            ready.wait(10)
            return 0

    ready = threading.Event()
    engine = Slow()
    served = Served(engine)
    guest = Guest(served.sock, memory)
    guest.write(4, 2, 2)
    monkeypatch.setattr(client_module.Client.ask, "__defaults__", (None, 0.05))
    assert guest.mmio.load(guest.bar(0) + STATUS, 4) == ONES
    ready.set()
    assert any("did not answer in time" in message for message in messages)
    guest.close()
    served.join()
    engine.close()


def test_a_file_that_could_become_shorter_is_not_mapped(engine: CopyEngine, memory: GuestMemory) -> None:
    """The guest's access would end the VM."""
    shared = engine.shared[2]
    os.close(shared.fd)
    shared.fd = os.memfd_create("unsealable", os.MFD_CLOEXEC)
    os.ftruncate(shared.fd, 4096)
    served = Served(engine)
    guest = Guest(served.sock, memory)
    guest.write(4, 2, 2)
    assert guest.vm.slots == {}
    guest.mmio.store(guest.bar(2), 4, 77)
    assert (guest.mmio.load(guest.bar(2), 4), shared.memory[0]) == (77, 77)
    guest.close()
    served.join()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no server is there"):
        connect("--user-device", str(tmp_path / "nothing"), patience=0.02)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no server is there"):
        connect("--user-device", str(tmp_path / "file"), patience=0.02)
    with pytest.raises(HostError):
        connect("--user-device", str(tmp_path / ("x" * 200)), patience=0.02)


# -- servers that lie -----------------------------------------------------------------------------

Lie = Callable[[Message], "Message | bytes | None"]


class Liar:
    """Answers as the engine would, but for what ``lies`` say; None hangs up."""

    def __init__(self, lies: dict[int, Lie]) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection = Connection(ours, "the client")
        self._lies = lies
        self.engine = CopyEngine()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        inner = Served(self.engine)
        server = Connection(inner.sock, "the server")
        try:
            while True:
                message, fds = self._connection.receive()
                if message.is_reply:
                    continue
                given: list[int] = []
                if (lie := self._lies.get(message.command)) is not None:
                    answer = lie(message)
                    if answer is None:
                        break
                    if isinstance(answer, bytes):
                        self._connection._socket.sendall(answer)
                        close_all(fds)
                        continue
                else:
                    server.send(message, fds)
                    answer, given = server.receive()
                self._connection.send(answer, given)
                close_all(given)
                close_all(fds)
        except PileusError:
            pass
        finally:
            self._connection.close()
            server.shut_down()
            server.close()
            inner.join()
            self.engine.close()


def say(request: Message, *values: int, tail: bytes = b"") -> Message:
    return Message(request.command, *values, tail=tail, number=request.number, flags=REPLY)


def no(request: Message) -> Message:
    return Message(request.command, number=request.number, flags=REPLY | ERROR, error=errno.EPERM)


def capabilities(**said: object) -> Lie:
    tail = json.dumps({"capabilities": said}).encode() + b"\0"
    return lambda request: say(request, 0, 0, tail=tail)


AREAS = struct.pack("=HHIIIQQ", 1, 1, 0, 1, 0, 0, 1 << 40)
LIES: dict[str, dict[int, Lie]] = {
    "hangs up at once": {Command.VERSION: lambda _: None},
    "refuses": {Command.VERSION: no},
    "another version": {Command.VERSION: lambda request: say(request, 1, 0)},
    "no json": {Command.VERSION: lambda request: say(request, 0, 0, tail=b"{{{")},
    "no descriptors": {Command.VERSION: capabilities(max_msg_fds=0)},
    "descriptors by name": {Command.VERSION: capabilities(max_msg_fds="ten")},
    "no memory": {Command.VERSION: capabilities(max_dma_maps=1)},
    "large pages": {Command.VERSION: capabilities(pgsizes=1 << 21)},
    "an answer to another": {Command.VERSION: lambda request: raw(9, bytes(16), REPLY)},
    "a wrong number": {Command.VERSION: lambda _: Message(1, 0, 0, number=0x7777, flags=REPLY)},
    "too short": {Command.DEVICE_GET_INFO: lambda _: raw(4, bytes(8), REPLY)},
    "too long": {Command.DEVICE_GET_INFO: lambda _: raw(4, b"", REPLY, size=1 << 30)},
    "no header": {Command.DEVICE_GET_INFO: lambda _: raw(4, b"", REPLY, size=3)},
    "no pci": {Command.DEVICE_GET_INFO: lambda request: say(request, 16, 0, 9, 5)},
    "no regions": {Command.DEVICE_GET_INFO: lambda request: say(request, 16, 2, 0, 5)},
    "another region": {Command.DEVICE_GET_REGION_INFO: lambda request: say(request, 32, 7, 77, 0, 4096, 0)},
    "a vast region": {
        Command.DEVICE_GET_REGION_INFO: lambda request: say(request, 32, 3, request.values[2], 0, 1 << 63, 0)
    },
    "odd regions": {
        Command.DEVICE_GET_REGION_INFO: lambda request: say(request, 32, 3, request.values[2], 0, 4097, 0)
    },
    "areas outside": {
        Command.DEVICE_GET_REGION_INFO: lambda request: say(
            request, 72, 15, request.values[2], 32, 4096, 0, tail=AREAS
        )
    },
    "a capability nowhere": {
        Command.DEVICE_GET_REGION_INFO: lambda request: say(request, 32, 15, request.values[2], 4000, 4096, 0)
    },
    "too many interrupts": {
        Command.DEVICE_GET_IRQ_INFO: lambda request: say(request, 16, 1, request.values[2], 9999)
    },
    "takes no memory": {Command.DMA_MAP: no},
    "does not reset": {Command.DEVICE_RESET: no},
    "another amount": {Command.REGION_READ: lambda request: say(request, 0, 7, 3, tail=bytes(3))},
    "reads nothing": {Command.REGION_READ: no},
    "reads zeroes": {
        Command.REGION_READ: lambda request: say(request, *request.values, tail=bytes(request.values[2]))
    },
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_a_server_that_lies_is_refused_when_the_vm_is_built(
    lies: dict[int, Lie], messages: list[str]
) -> None:
    before = open_fds()
    with make_memory([(0, 2 * MIB), (1 << 32, MIB)], shared=True) as memory:
        liar = Liar(lies)
        with pytest.raises((HostError, RemoteProtocolError, ConfigError)):
            Guest(liar.sock, memory)
        liar.thread.join(30)
        assert not liar.thread.is_alive()
    assert open_fds() == before


U64 = st.one_of(st.integers(0, 300), st.integers(0, (1 << 64) - 1))
ASKS = st.one_of(
    st.builds(lambda iova, count: Message(Command.DMA_READ, iova, count), U64, U64),
    st.builds(
        lambda iova, tail: Message(Command.DMA_WRITE, iova, len(tail), tail=tail), U64, st.binary(max_size=64)
    ),
    st.builds(lambda values: Message(Command.DEVICE_GET_INFO, *values), st.tuples(*[st.integers(0, 9)] * 4)),
)
JUNK = st.builds(
    raw, st.integers(0, 20), st.binary(max_size=80), st.sampled_from([0, REPLY, REPLY | ERROR, 0x10, 0x40])
)


@settings(max_examples=40)
@given(st.lists(ASKS, max_size=5), st.lists(st.one_of(JUNK, st.binary(max_size=40)), max_size=4))
def test_whatever_a_server_says_later_the_vm_lives(asks: list[Message], junk: list[bytes]) -> None:
    before = open_fds()
    with make_memory([(0, 2 * MIB)], shared=True) as memory:
        memory.write(0, bytes(range(256)))
        liar = Liar({})
        guest = Guest(liar.sock, memory)
        guest.write(4, 2, 6)
        try:
            for ask in asks:
                liar._connection.send(ask)
            for data in junk:
                liar._connection._socket.sendall(data)
        except (HostError, OSError):
            pass  # it was left already
        liar._connection.shut_down()
        assert guest.mmio.load(guest.bar(0) + STATUS, 4) == ONES
        guest.use_messages()
        guest.close()
        liar.thread.join(30)
        assert not liar.thread.is_alive()
    assert open_fds() == before


def test_a_server_may_use_the_guest_s_memory_and_no_more(memory: GuestMemory) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    answers: list[Message] = []

    def serve() -> None:
        engine = CopyEngine()
        inner = Served(engine)
        server, client = Connection(inner.sock, "the server"), Connection(ours, "the client")
        try:
            while True:
                message, fds = client.receive()
                if message.command == Command.DEVICE_RESET:
                    for ask in (
                        Message(Command.DMA_READ, 16, 4),
                        Message(Command.DMA_WRITE, (1 << 32) + 8, 4, tail=b"abcd"),
                        Message(Command.DMA_READ, 2 * MIB - 2, 4),
                        Message(Command.DMA_READ, 0, 2 * MIB),
                        Message(Command.DMA_WRITE, (1 << 64) - 2, 4, tail=b"abcd"),
                    ):
                        client.send(ask)
                        answers.append(client.receive()[0])
                server.send(message, fds)
                close_all(fds)
                answer, given = server.receive()
                client.send(answer, given)
                close_all(given)
        except PileusError:
            client.close()
            server.shut_down()
            server.close()
            inner.join()
            engine.close()

    memory.write(16, b"ABCD")
    thread = threading.Thread(target=serve)
    thread.start()
    guest = Guest(theirs, memory)
    guest.close()
    thread.join(30)
    assert [answer.failed for answer in answers] == [False, False, True, True, True]
    assert answers[0].tail == b"ABCD"
    assert memory.read((1 << 32) + 8, 4) == b"abcd"

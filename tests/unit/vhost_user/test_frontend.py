"""What a front-end says to a back-end, in which order, and what it makes of the answers."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.errors import HostError, LocalProtocolError, PileusError, RemoteProtocolError
from pileus.memory import GuestMemory
from pileus.testing import make_memory
from pileus.vhost_user import connection, protocol
from pileus.vhost_user.connection import Client
from pileus.vhost_user.frontend import CLOSED, IDLE, RUNNING, STRANGER, TRANSITIONS, Frontend, Ring
from pileus.vhost_user.protocol import HEADER, REPLY, VERSION, Feature, Message, Request
from pileus.virtio.device import VERSION_1
from pileus.virtio.queue import Queue

from .fake_backend import ALL, UNKNOWN, Answer, FakeBackend

MIB = 1 << 20
HIGH = 1 << 32
Meet = Callable[..., tuple[Frontend, FakeBackend]]


@pytest.fixture
def meet(tmp_path: Path) -> Iterator[Meet]:
    """Make a back-end, and a front-end that is connected to it."""
    made: list[Any] = []

    def meet(**about: Any) -> tuple[Frontend, FakeBackend]:
        backend = FakeBackend(tmp_path / f"socket{len(made)}", **about)
        sock = Client(backend.path).attempt()
        assert sock is not None
        frontend = Frontend(sock, "the back-end")
        made.extend([backend, frontend])
        return frontend, backend

    yield meet
    for each in reversed(made):
        each.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with make_memory([(0, MIB), (HIGH, MIB)], shared=True) as memory:
        yield memory


@pytest.fixture
def queues() -> Iterator[list[Queue]]:
    queues = [Queue(64) for _ in range(2)]
    for index, queue in enumerate(queues):
        queue.descriptors, queue.available, queue.used = (HIGH + 0x1000 * (4 * index + n) for n in range(3))
        queue.call_fd = os.eventfd(0)
    yield queues
    for queue in queues:
        os.close(queue.call_fd)
        queue.close()


def rings(queues: list[Queue]) -> list[Ring]:
    return [Ring(index, queue, base=7 + index) for index, queue in enumerate(queues)]


def test_they_agree_on_what_both_know(meet: Meet) -> None:
    frontend, backend = meet(protocol_features=ALL | Feature.PAGEFAULT | UNKNOWN)
    frontend.negotiate()
    assert frontend.features == backend.features
    assert frontend.protocol_features == backend.agreed == ALL
    assert frontend.max_queues == 8
    assert backend.names()[:4] == [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
    ]


def test_a_back_end_without_protocol_features_is_not_asked_for_them(meet: Meet) -> None:
    frontend, backend = meet(features=VERSION_1)
    frontend.negotiate()
    assert backend.names() == ["SET_OWNER", "GET_FEATURES"]
    assert frontend.protocol_features == 0
    assert frontend.max_queues is None


@pytest.mark.parametrize("slots", [True, False], ids=["region by region", "in a table"])
@pytest.mark.parametrize("acknowledged", [True, False], ids=["acknowledged", "or not"])
def test_memory_and_rings_are_handed_over(
    meet: Meet, memory: GuestMemory, queues: list[Queue], slots: bool, acknowledged: bool
) -> None:
    features = ALL & ~(0 if slots else Feature.CONFIGURE_MEM_SLOTS)
    features &= ~(0 if acknowledged else Feature.REPLY_ACK)
    frontend, backend = meet(protocol_features=features)
    frontend.negotiate()
    frontend.start(memory, VERSION_1, rings(queues))
    assert frontend.state == RUNNING
    assert backend.virtio_features == VERSION_1 | protocol.PROTOCOL_FEATURES
    assert [region[:2] for region in backend.regions] == [(0, MIB), (HIGH, MIB)]
    assert backend.memory is not None
    memory.write(HIGH + 5, b"seen by both")
    assert backend.memory.read(HIGH + 5, 12) == b"seen by both"
    for index, (queue, vring) in enumerate(zip(queues, backend.vrings, strict=False)):
        assert (vring.size, vring.base, vring.enabled) == (64, 7 + index, True)
        assert [backend._gpa(hva) for hva in vring.addresses] == [
            queue.descriptors,
            queue.used,
            queue.available,
        ]
        os.eventfd_write(vring.call, 1)
        assert os.eventfd_read(queue.call_fd) == 1
        os.eventfd_write(queue.kick_fd, 1)
        assert os.eventfd_read(vring.kick) == 1


def test_rings_are_taken_back_where_they_stand(meet: Meet, memory: GuestMemory, queues: list[Queue]) -> None:
    frontend, backend = meet()
    frontend.negotiate()
    for _ in range(2):
        frontend.start(memory, VERSION_1, rings(queues))
        assert frontend.stop() == {0: 7, 1: 8}
        assert frontend.state == IDLE
    assert backend.names().count("ADD_MEM_REG") == 2  # once for each region
    assert not any(vring.enabled for vring in backend.vrings)


def test_without_an_interrupt_no_descriptor_goes(
    meet: Meet, memory: GuestMemory, queues: list[Queue]
) -> None:
    frontend, backend = meet()
    frontend.negotiate()
    call_fd, queues[0].call_fd = queues[0].call_fd, -1
    frontend.start(memory, VERSION_1, rings(queues))
    assert backend.vrings[0].call == -1
    frontend.set_call(0, call_fd)
    os.eventfd_write(backend.vrings[0].call, 1)
    assert os.eventfd_read(call_fd) == 1
    queues[0].call_fd = call_fd


def test_private_memory_cannot_be_shared(meet: Meet, queues: list[Queue]) -> None:
    frontend, _ = meet()
    frontend.negotiate()
    with make_memory([(0, MIB)]) as private, pytest.raises(LocalProtocolError, match="descriptor"):
        frontend.start(private, VERSION_1, rings(queues))


def test_configuration_is_read_and_written(meet: Meet) -> None:
    frontend, backend = meet(config=bytes(range(60)))
    frontend.negotiate()
    assert frontend.config(60) == bytes(range(60))
    frontend.set_config(32, b"\xff")
    assert frontend.config(60)[32] == 0xFF
    assert backend.config[33] == 33


def test_what_is_in_flight_outlives_a_back_end(meet: Meet, memory: GuestMemory, queues: list[Queue]) -> None:
    first, _ = meet()
    first.negotiate()
    inflight = first.inflight(2, 64)
    assert inflight is not None
    for frontend, backend in (meet(), meet()):
        frontend.negotiate()
        frontend.start(memory, VERSION_1, rings(queues), inflight)
        assert backend.inflight == os.fstat(inflight.fd).st_ino
    inflight.close()


def test_what_is_written_can_be_logged(meet: Meet, memory: GuestMemory, queues: list[Queue]) -> None:
    frontend, backend = meet()
    frontend.negotiate()
    frontend.start(memory, VERSION_1, rings(queues))
    log = os.memfd_create("log")
    frontend.start_logging(log, 4096)
    assert backend.logged == os.fstat(log).st_ino
    assert backend.virtio_features & protocol.LOG_ALL
    asked = [message for message in backend.asked if message.request == Request.SET_VRING_ADDR][-2:]
    assert [(each.values[1], each.values[5]) for each in asked] == [(1, queue.used) for queue in queues]
    frontend.stop_logging()
    assert not backend.virtio_features & protocol.LOG_ALL
    os.close(log)


def test_a_back_end_that_cannot_log_is_not_asked(meet: Meet) -> None:
    frontend, _ = meet(protocol_features=ALL & ~Feature.LOG_SHMFD)
    frontend.negotiate()
    with pytest.raises(LocalProtocolError, match="log"):
        frontend.start_logging(0, 4096)


# -- back-ends that do not keep to it -------------------------------------------------------------

HOSTILE: dict[str, tuple[int, Answer, str]] = {
    "refuses": (Request.SET_VRING_NUM, lambda asked: Message(asked.request, 1), "refuses SET_VRING_NUM"),
    "answers something else": (
        Request.GET_VRING_BASE, lambda _: Message(Request.GET_FEATURES, 1), "a reply to GET_FEATURES"
    ),
    "answers for another ring": (
        Request.GET_VRING_BASE, lambda _: Message(Request.GET_VRING_BASE, 9, 0), "ring 9"
    ),
    "sends half": (
        Request.GET_FEATURES, lambda _: HEADER.pack(Request.GET_FEATURES, VERSION | REPLY, 4), "4 bytes"
    ),
    "sends a request": (
        Request.GET_FEATURES, lambda _: HEADER.pack(Request.GET_FEATURES, VERSION, 8), "no reply"
    ),
    "sends less configuration": (
        Request.GET_CONFIG, lambda _: Message(Request.GET_CONFIG, 0, 8, 0, tail=bytes(8)), "60 bytes"
    ),
    "has no configuration": (
        Request.GET_CONFIG, lambda _: HEADER.pack(Request.GET_CONFIG, VERSION | REPLY, 0), "60 bytes"
    ),
    "has no room for memory": (
        Request.GET_MAX_MEM_SLOTS, lambda asked: Message(asked.request, 1), "takes 1 regions"
    ),
    "sends no inflight region": (
        Request.GET_INFLIGHT_FD, lambda asked: Message(asked.request, 1 << 50, 0, 2, 64), ""
    ),
}  # fmt: skip


def converse(frontend: Frontend, memory: GuestMemory, queues: list[Queue]) -> None:
    """All that a front-end may do, in order."""
    frontend.negotiate()
    frontend.config(60)
    inflight = frontend.inflight(2, 64)
    if inflight is not None:
        inflight.close()
    frontend.start(memory, VERSION_1, rings(queues))
    frontend.stop()
    frontend.reset_device()


@pytest.mark.parametrize(("request_", "answer", "told"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_back_end_that_breaks_the_rules_is_told_of(
    meet: Meet, memory: GuestMemory, queues: list[Queue], request_: int, answer: Answer, told: str
) -> None:
    frontend, _ = meet(answers={request_: answer})
    if told:
        with pytest.raises(RemoteProtocolError, match=told):
            converse(frontend, memory, queues)
    else:
        converse(frontend, memory, queues)


def test_a_back_end_that_answers_nothing_costs_a_pause(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.Connection.allow, "__defaults__", (0.05,))
    frontend, _ = meet(answers={Request.GET_FEATURES: lambda _: None})
    with pytest.raises(HostError, match="in time"):
        frontend.negotiate()


ANSWERS = st.tuples(
    st.one_of(st.integers(0, 255), st.sampled_from([1, 5, 15, 24, 31])),
    st.sampled_from([0, 8, 8, 8, 12, 24]).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
    st.sampled_from([0, 0, 0, 1, 2]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ANSWERS, min_size=6, max_size=40))
def test_whatever_a_back_end_answers_nothing_is_left_open(answers: list[tuple[int, bytes, int]]) -> None:
    """Headers that could be right, followed by anything, with descriptors now and then."""
    before = set(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    frontend = Frontend(ours, "the back-end")
    expected = [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES]
    with theirs, make_memory([(0, MIB)], shared=True) as memory:
        for index, (number, payload, fds) in enumerate(answers):
            request = expected[index] if index < len(expected) else number
            header = HEADER.pack(request, VERSION | REPLY, len(payload))
            socket.send_fds(theirs, [header + payload], [theirs.fileno()] * fds)
        theirs.shutdown(socket.SHUT_WR)
        queue = Queue(64)
        queue.used = queue.available = queue.descriptors = 0x1000
        with pytest.raises(PileusError):
            converse(frontend, memory, [queue])
        frontend.close()
        queue.close()
    assert set(os.listdir("/proc/self/fd")) <= before


# -- states ---------------------------------------------------------------------------------------


def test_each_state_leads_somewhere_known() -> None:
    assert set(TRANSITIONS) == {STRANGER, IDLE, RUNNING, CLOSED}
    for events in TRANSITIONS.values():
        assert set(events.values()) <= set(TRANSITIONS)
        assert events["close"] == CLOSED


def test_nothing_starts_before_it_is_negotiated(meet: Meet, memory: GuestMemory, queues: list[Queue]) -> None:
    frontend, _ = meet()
    with pytest.raises(LocalProtocolError, match="no start while stranger"):
        frontend.start(memory, VERSION_1, rings(queues))
    with pytest.raises(LocalProtocolError, match="no stop while stranger"):
        frontend.stop()

"""virtio-net on a real TAP, through a driver in memory."""

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pileus.config.model import NetConfig
from pileus.errors import HostError
from pileus.memory._iommu import Endpoint, Iommu
from pileus.net import tap
from pileus.net.tap import Tap
from pileus.testing import F_WRITE, FakeDriver
from pileus.virtio import status
from pileus.virtio.devices import net
from tests.unit.net.namespace import Namespace
from tests.unit.virtio.devices.card import GUEST_MAC, HEADER, HOST_MAC, Card, frame, header, until

NEEDS_CSUM = 1
NONE, TCPV4, UDP, TCPV6, UDP_L4, ECN = 0, 1, 3, 4, 5, 0x80
PLAIN = net.MAC | net.STATUS | net.CTRL_VQ | net.CTRL_RX | net.CTRL_MAC_ADDR
UDP_SEGMENT = 103
GUEST_IP = "192.168.249.2"


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace() as host:
        yield host


@pytest.fixture(autouse=True)
def nothing_is_left(host: Namespace) -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))
    yield
    assert host.links == ["lo"]
    assert (sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))) == before


@pytest.fixture
def card(host: Namespace) -> Iterator[Card]:
    card = Card()
    yield card
    card.close()


@pytest.fixture
def plain(host: Namespace) -> Iterator[Card]:
    """Without offloads and mergeable buffers."""
    card = Card(features=PLAIN)
    yield card
    card.close()


@pytest.fixture
def wide(host: Namespace) -> Iterator[Card]:
    """With four queue pairs."""
    card = Card(num_queues=8)
    yield card
    card.close()


# -- both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [None, PLAIN], ids=["all features", "few"])
@pytest.mark.parametrize("event_idx", [True, False], ids=["EVENT_IDX", "flags"])
def test_frames_go_both_ways(features: int | None, event_idx: bool) -> None:
    card = Card(features=features, event_idx=event_idx)
    for round in range(600):  # more than the ring has
        sent = frame(b"to the guest %d" % round)
        card.offer(2048)
        card.host.send(sent)
        assert card.receive() == (0, NONE, 0, 0, 0, 0, sent)
        back = frame(b"from the guest %d" % round, to=HOST_MAC, source=GUEST_MAC)
        card.send(header() + back)
        assert card.next_on_host() == back
    assert card.net.counters() == {
        "rx_packets": 600,
        "rx_bytes": 600 * 60,
        "rx_dropped": 0,
        "tx_packets": 600,
        "tx_bytes": 600 * 60,
        "tx_dropped": 0,
    }
    card.close()


def test_a_burst_is_taken_whole(card: Card) -> None:
    card.offer(2048, count=200)
    for number in range(150):
        card.host.send(frame(b"%d" % number))
    used = card.driver.wait(0, 150)
    frames = [card.driver.read(each.head)[HEADER.size : each.length] for each in used]
    assert frames == [frame(b"%d" % number) for number in range(150)]


@given(cuts=st.lists(st.integers(1, 40), max_size=12), indirect=st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_packet_may_be_cut_anywhere(card: Card, cuts: list[int], indirect: bool) -> None:
    """Also within its header; for sending, and, with the same cuts, for receiving."""
    sent = header() + frame(b"0123456789" * 30, to=HOST_MAC, source=GUEST_MAC)
    edges = [0, *(sum(cuts[: end + 1]) for end in range(len(cuts))), len(sent)]
    edges = sorted({min(edge, len(sent)) for edge in edges})
    parts = [sent[low:high] for low, high in pairwise(edges)]
    card.send(*parts, indirect=indirect)
    assert card.next_on_host() == sent[HEADER.size :]
    back = frame(b"9876543210" * 30)
    card.offer(*map(len, parts), indirect=indirect)
    card.host.send(back)
    assert card.receive().frame == back


# -- behind an IOMMU ------------------------------------------------------------------------------


def test_a_buffer_that_is_unmapped_while_it_waits_gets_no_packet(host: Namespace) -> None:
    """The interface has taken it already, for the packet to come."""
    card = Card(iommu_endpoint=Iommu(bypass=False).add_endpoint(8, "net"))
    try:
        for _ in range(2):  # it is at home
            card.offer(2048)
            card.host.send(frame(b"one"))
            assert card.receive().frame == frame(b"one")
        first = card.driver.add(writable=[4096])
        second = card.driver.add(writable=[2048])
        card.driver.kick()
        endpoint, scrambled = card.net.iommu, card.driver.scrambled
        assert isinstance(endpoint, Endpoint)
        assert scrambled is not None
        time.sleep(0.05)  # most often it has them by now, and else the test proves less
        block = card.driver.rings[0].blocks(first)[0]
        before = scrambled.read(block.gpa, block.size)
        scrambled.unmap(endpoint, block.gpa, 1)
        card.host.send(frame(b"two"))
        used = dict(card.driver.wait(0, 2))
        assert used[first] == 0
        assert card.driver.read(second)[HEADER.size : used[second]] == frame(b"two")
        assert scrambled.read(block.gpa, block.size) == before
    finally:
        card.close()


# -- receiving ------------------------------------------------------------------------------------


@given(
    room=st.lists(st.lists(st.integers(12, 500), min_size=1, max_size=3), min_size=1, max_size=9),
    lengths=st.lists(st.integers(60, 1500), min_size=1, max_size=6),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_packet_is_spread_over_chains_of_any_shape(
    host: Namespace, room: list[list[int]], lengths: list[int]
) -> None:
    card = Card()
    try:
        sent = [frame(bytes([number]) * (length - 14)) for number, length in enumerate(lengths)]
        for each in sent:
            card.host.send(each)
        for each in sent:  # at first the frame waits for chains, later there are some left
            have, turn = 0, 0
            while have < HEADER.size + len(each):
                card.offer(*room[turn % len(room)])
                have += sum(room[turn % len(room)])
                turn += 1
            assert card.receive().frame == each
    finally:
        card.close()


def test_packets_wait_in_the_tap_while_there_are_no_chains(card: Card) -> None:
    for number in range(20):
        card.host.send(frame(b"%d" % number))
    until(lambda: asleep(card))
    for number in range(20):
        card.offer(2048)
        assert card.receive().frame == frame(b"%d" % number)
    assert card.counter("rx_dropped") == 0


def test_an_idle_or_starved_engine_sleeps(card: Card) -> None:
    before = cpu_ticks(card)
    card.offer(100)
    for _ in range(300):
        card.host.send(frame(bytes(1000)))
    time.sleep(0.3)
    assert cpu_ticks(card) - before <= 3


def test_a_packet_that_the_chains_are_too_few_for_waits_a_while(card: Card) -> None:
    card.offer(1000)
    card.host.send(frame(bytes(range(100)) * 14))
    card.host.send(frame(b"the next"))
    until(lambda: asleep(card))
    card.offer(1000)
    assert card.receive().frame == frame(bytes(range(100)) * 14)
    card.offer(1000)
    assert card.receive().frame == frame(b"the next")


def test_but_not_for_ever(card: Card) -> None:
    card.hold(0.01)
    card.offer(1000)
    card.host.send(frame(bytes(1400)))
    card.host.send(frame(b"the next"))
    assert card.receive().frame == frame(b"the next")
    assert card.counter("rx_dropped") == 1


def test_a_packet_that_no_number_of_chains_will_hold_is_dropped(card: Card) -> None:
    """A chain that is nothing but tiny buffers, and not even a thousand of them are enough."""
    for _ in range(2):
        card.offer(12, *[1] * 900, indirect=True)
    card.host.send(frame(bytes(1400)))
    card.host.send(frame(b"the next"))
    assert card.receive().frame == frame(b"the next")
    assert card.counter("rx_dropped") == 1


def test_without_mergeable_buffers_a_packet_has_one_chain(plain: Card) -> None:
    plain.offer(1000, count=3)
    for size in (1400, 10, 1400, 11):
        plain.host.send(frame(bytes(size)))
    assert [plain.receive().frame for _ in range(1)] == [frame(bytes(10))]
    assert plain.receive().frame == frame(bytes(11))
    assert plain.counter("rx_dropped") == 2


@pytest.mark.parametrize("buffers", [[11], [5, 6]])
def test_a_buffer_without_room_for_the_header_stops_the_device(card: Card, buffers: list[int]) -> None:
    card.offer(*buffers)
    card.host.send(frame())
    until(lambda: bool(card.driver.status & status.NEEDS_RESET))
    card.driver.start()
    card.offer(2048)
    card.host.send(frame(b"again"))
    assert card.receive().frame[14:19] in (b".....", b"again")


def test_a_buffer_that_is_not_for_the_device_stops_it(card: Card) -> None:
    card.driver.add(readable=[bytes(2000)], queue=0)
    card.driver.kick(0)
    until(lambda: bool(card.driver.status & status.NEEDS_RESET))
    assert card.net.pairs[0].fault == "a receive buffer is not for the device to write"


@pytest.mark.parametrize("queue", [0, 1])
def test_a_broken_ring_stops_the_device(card: Card, queue: int) -> None:
    card.driver.write_descriptor(0, gpa=card.driver.RAM_SIZE * 8, length=2000, flags=F_WRITE, queue=queue)
    card.driver.offer(0, queue)
    card.driver.kick(queue)
    until(lambda: bool(card.driver.status & status.NEEDS_RESET))
    assert card.net.pairs[0].fault == "a buffer is not guest memory"


def test_a_reset_gives_back_chains_that_were_taken_ahead(card: Card) -> None:
    card.offer(100, count=50)
    card.host.send(frame(bytes(1000)))
    assert len(card.receive().frame) == 1014
    until(lambda: asleep(card))
    card.net.pairs[0].stop()
    state = card.net.queues[0].state()
    assert state["next_avail"] == state["next_used"] == 11


# -- offloads -------------------------------------------------------------------------------------


def udp_on_host(host: Namespace, card: Card) -> socket.socket:
    """A socket of the host that talks to port 7 of the guest."""
    host.ip("neigh", "add", GUEST_IP, "lladdr", GUEST_MAC.hex(":"), "dev", card.net.tap.name)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind((net.DEFAULT_IP, 7))
    sock.connect((GUEST_IP, 7))
    return sock


def ones_complement(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def udp_frame(payload: bytes, *, checksum: bool) -> bytes:
    """From the guest to the host; without ``checksum`` that is left to offloading."""
    source, target = socket.inet_aton(GUEST_IP), socket.inet_aton(net.DEFAULT_IP)
    length = 8 + len(payload)
    pseudo = ones_complement(source + target + struct.pack(">HH", 17, length))
    udp = struct.pack(">HHHH", 7, 7, length, 0 if checksum else pseudo)
    if checksum:
        rest = 0xFFFF - ones_complement(struct.pack(">H", pseudo) + udp + payload)
        udp = udp[:6] + struct.pack(">H", rest)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + source + target
    ip = ip[:10] + struct.pack(">H", 0xFFFF - ones_complement(ip)) + ip[12:]
    return HOST_MAC + GUEST_MAC + b"\x08\x00" + ip + udp + payload


CHECKSUM = {"flags": NEEDS_CSUM, "csum_start": 34, "csum_offset": 6}


def test_the_host_s_sockets_hear_the_guest(host: Namespace, card: Card) -> None:
    sock = udp_on_host(host, card)
    card.send(header() + udp_frame(b"whole", checksum=True))
    assert sock.recv(2000) == b"whole"
    card.send(header(**CHECKSUM), udp_frame(b"to be checked", checksum=False))
    assert sock.recv(2000) == b"to be checked"
    sock.close()


@pytest.mark.parametrize("hdr_len", [0, 42, 65535])
def test_a_large_udp_packet_is_cut_by_the_host(host: Namespace, card: Card, hdr_len: int) -> None:
    if not card.net.tap.has_uso:
        pytest.skip("this kernel has no USO")
    sock = udp_on_host(host, card)
    large = udp_frame(bytes(range(250)) * 20, checksum=False)
    card.send(header(**CHECKSUM, gso_type=UDP_L4, gso_size=1000, hdr_len=hdr_len), large)
    assert [sock.recv(9000) for _ in range(5)] == [bytes(range(250)) * 4] * 5
    sock.close()


def test_the_guest_is_given_large_packets_whole(host: Namespace, card: Card) -> None:
    if not card.net.tap.has_uso:
        pytest.skip("this kernel has no USO")
    sock = udp_on_host(host, card)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    data = os.urandom(40000)
    for _ in range(3):  # the first by the spill, the others in one go
        card.offer(1526, count=35)
        sock.send(data)
        packet = card.receive()
        assert (packet.flags, packet.gso_type, packet.gso_size) == (NEEDS_CSUM, UDP_L4, 1000)
        assert (packet.csum_start, packet.csum_offset) == (34, 6)
        assert packet.frame[42:] == data
    sock.close()


@pytest.mark.parametrize("features", [PLAIN, PLAIN | net.GUEST_CSUM], ids=["no offload", "checksums"])
def test_a_guest_without_offloads_is_spared_them(host: Namespace, features: int) -> None:
    card = Card(features=features)
    sock = udp_on_host(host, card)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    card.offer(2048, count=10)
    sock.send(bytes(5000))
    for _ in range(5):
        packet = card.receive()
        assert packet.gso_type == NONE
        assert packet.flags == (NEEDS_CSUM if features & net.GUEST_CSUM else 0)
        assert packet.frame[42:] == bytes(1000)
    sock.close()
    card.close()


def test_offloads_are_switched_by_command(host: Namespace, card: Card) -> None:
    sock = udp_on_host(host, card)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    assert card.command(5, 0, struct.pack("<Q", net.GUEST_CSUM)) == net.OK
    card.offer(2048, count=3)
    sock.send(bytes(2000))
    assert [card.receive().gso_type for _ in range(2)] == [NONE, NONE]
    sock.close()


# -- headers of a hostile driver ------------------------------------------------------------------

BAD_HEADERS = {
    "a checksum behind the end": header(NEEDS_CSUM, csum_start=60, csum_offset=0),
    "a checksum far behind the end": header(NEEDS_CSUM, csum_start=65535, csum_offset=65535),
    "an unknown type": header(NEEDS_CSUM, 2, 0, 100, 14, 2),
    "another unknown type": header(NEEDS_CSUM, 0x7F, 0, 100, 14, 2),
    "ECN of nothing but a type": header(NEEDS_CSUM, UDP | ECN, 0, 100, 14, 2),
    "segments of no size": header(NEEDS_CSUM, TCPV4, 0, 0, 14, 2),
    "segments without a checksum": header(0, TCPV4, 0, 100, 14, 2),
}


@pytest.mark.parametrize("bad", BAD_HEADERS.values(), ids=list(BAD_HEADERS))
def test_a_bad_header_drops_its_packet_alone(card: Card, bad: bytes) -> None:
    card.send(bad + frame(to=HOST_MAC))
    card.send(header() + frame(b"the next", to=HOST_MAC))
    assert card.next_on_host() == frame(b"the next", to=HOST_MAC)
    assert card.counter("tx_dropped") == 1


@pytest.mark.parametrize(
    "forbidden",
    [CHECKSUM, *({**CHECKSUM, "gso_type": kind, "gso_size": 100} for kind in (TCPV4, UDP, TCPV6, UDP_L4))],
)
def test_what_was_not_negotiated_is_not_sent(plain: Card, forbidden: dict[str, int]) -> None:
    plain.send(header(**forbidden) + frame(bytes(200), to=HOST_MAC))
    assert plain.counter("tx_dropped") == 1


def test_a_packet_larger_than_any_is_dropped(card: Card) -> None:
    card.send(header() + frame(bytes(66000), to=HOST_MAC))
    assert card.counter("tx_dropped") == 1


@pytest.mark.parametrize("length", range(1, 13))
def test_a_packet_that_is_no_more_than_a_header_is_dropped(card: Card, length: int) -> None:
    card.send(bytes(length))
    assert card.counter("tx_dropped") == 1


def test_an_answer_s_room_in_a_packet_to_send_is_ignored(card: Card) -> None:
    card.driver.add(readable=[header() + frame(to=HOST_MAC)], writable=[100], queue=1)
    card.driver.kick(1)
    assert [used.length for used in card.driver.wait(1)] == [0]
    assert card.next_on_host() == frame(to=HOST_MAC)


@given(st.binary(min_size=1, max_size=80))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_a_packet_or_none(card: Card, data: bytes) -> None:
    before = card.counter("tx_dropped") + card.counter("tx_packets")
    card.send(data)
    assert card.counter("tx_dropped") + card.counter("tx_packets") == before + 1
    assert not card.driver.status & status.NEEDS_RESET


def test_a_host_that_is_down_drops_packets(host: Namespace, card: Card) -> None:
    host.ip("link", "set", card.net.tap.name, "down")
    card.send(header() + frame(to=HOST_MAC))
    assert card.counter("tx_dropped") == 1
    host.ip("link", "set", card.net.tap.name, "up")
    card.send(header() + frame(to=HOST_MAC))
    assert card.counter("tx_packets") == 1
    card.offer(2048)
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sender.bind((card.net.tap.name, 0))
    sender.send(frame(b"up again"))
    assert card.receive().frame == frame(b"up again")
    sender.close()


def test_a_tap_that_is_gone_takes_nothing_and_costs_nothing(host: Namespace, card: Card) -> None:
    card.offer(2048)
    host.ip("link", "del", card.net.tap.name)
    before = cpu_ticks(card)
    for _ in range(3):
        card.send(header() + frame(to=HOST_MAC))
    time.sleep(0.2)
    assert cpu_ticks(card) - before <= 2
    assert card.counter("tx_dropped") == 3


# -- the control queue ----------------------------------------------------------------------------

COMMANDS = {
    "promiscuous": (0, 0, b"\1", net.OK),
    "not promiscuous": (0, 0, b"\0", net.OK),
    "all multicast": (0, 1, b"\1", net.OK),
    "no broadcast": (0, 5, b"\1", net.OK),
    "an unknown mode": (0, 6, b"\1", net.ERR),
    "neither on nor off": (0, 0, b"\2", net.ERR),
    "a mode without a value": (0, 0, b"", net.ERR),
    "a mode with too much": (0, 0, b"\1\1", net.ERR),
    "an empty table": (1, 0, bytes(8), net.OK),
    "a table": (1, 0, b"\1\0\0\0" + GUEST_MAC + b"\2\0\0\0" + b"\1" * 12, net.OK),
    "half a table": (1, 0, bytes(4), net.ERR),
    "a table that ends early": (1, 0, b"\2\0\0\0" + GUEST_MAC, net.ERR),
    "a table that claims the moon": (1, 0, b"\xff" * 8, net.ERR),
    "a table and more": (1, 0, bytes(9), net.ERR),
    "an address": (1, 1, b"\2\0\0\0\0\5", net.OK),
    "a multicast address": (1, 1, b"\3\0\0\0\0\5", net.ERR),
    "no address": (1, 1, b"\2\0\0\0\0", net.ERR),
    "VLANs, which are not offered": (2, 0, b"\1\0", net.ERR),
    "pairs, which are not offered": (4, 0, b"\1\0", net.ERR),
    "no offloads": (5, 0, bytes(8), net.OK),
    "offloads of nobody": (5, 0, b"\xff" * 8, net.ERR),
    "a part of offloads": (5, 0, bytes(4), net.ERR),
    "an unknown class": (77, 0, b"", net.ERR),
}


@pytest.mark.parametrize(("group", "command", "data", "answer"), COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_is_answered(card: Card, group: int, command: int, data: bytes, answer: int) -> None:
    assert card.command(group, command, data) == answer


def test_a_command_without_the_feature_is_refused(plain: Card) -> None:
    assert plain.command(5, 0, bytes(8)) == net.ERR
    assert plain.command(0, 5, b"\1") == net.ERR


def test_a_command_without_room_for_the_answer_stops_the_device(card: Card) -> None:
    card.driver.add(readable=[b"\0\0\1"], queue=2)
    card.driver.kick(2)
    assert card.driver.status & status.NEEDS_RESET


@given(data=st.binary(max_size=40), room=st.integers(1, 20))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_answered(card: Card, data: bytes, room: int) -> None:
    card.driver.add(readable=[data] if data else [], writable=[room], queue=2)
    card.driver.kick(2)
    assert [used.length for used in card.driver.wait(2)] == [1]


def test_many_commands_leave_the_control_loop_to_others_in_between(card: Card) -> None:
    for _ in range(20):
        card.driver.add(readable=[b"\0\0\1"], writable=[1], queue=2)
    card.net.kicked(2)
    assert len(card.driver.used(2)) == 16
    card.driver.serve()
    assert len(card.driver.used(2)) == 4


def test_a_new_address_stands_in_the_configuration_until_a_reset(card: Card) -> None:
    assert card.driver.read_config(0, 6) == GUEST_MAC
    card.command(1, 1, b"\2\0\0\0\0\5")
    assert card.driver.read_config(0, 6) == b"\2\0\0\0\0\5"
    card.driver.reset()
    assert card.driver.read_config(0, 6) == GUEST_MAC


def test_the_tap_passes_on_what_the_driver_wants(card: Card) -> None:
    group, other = b"\1\0\x5e\0\0\1", b"\2\0\0\0\0\x77"
    sent = [
        frame(name, to=to)
        for to, name in ((other, b"1"), (group, b"2"), (b"\xff" * 6, b"3"), (GUEST_MAC, b"4"))
    ]

    def received(count: int) -> list[bytes]:
        card.offer(2048, count=count)
        for each in sent:
            card.host.send(each)
        return [card.receive().frame for _ in range(count)]

    assert received(4) == sent
    card.command(1, 0, bytes(8))
    assert received(2) == sent[2:]
    card.command(1, 0, bytes(4) + b"\1\0\0\0" + group)
    assert received(3) == sent[1:]
    card.command(0, 0, b"\1")
    assert received(4) == sent
    card.command(0, 0, b"\0")
    card.command(0, 5, b"\1")
    assert received(2) == [sent[1], sent[3]]
    card.driver.start()
    assert received(4) == sent


# -- several pairs --------------------------------------------------------------------------------


def test_pairs_work_once_they_are_asked_for(wide: Card) -> None:
    assert struct.unpack("<H", wide.driver.read_config(8, 2)) == (4,)
    assert [pair.running for pair in wide.net.pairs] == [True, False, False, False]
    assert wide.command(4, 0, b"\3\0") == net.OK
    assert [pair.running for pair in wide.net.pairs] == [True, True, True, False]
    for pair in range(3):
        wide.send(header() + frame(b"%d" % pair, to=HOST_MAC), pair=pair)
        assert wide.next_on_host() == frame(b"%d" % pair, to=HOST_MAC)
    assert wide.command(4, 0, b"\1\0") == net.OK
    assert [pair.running for pair in wide.net.pairs] == [True, False, False, False]
    wide.offer(2048)
    wide.host.send(frame())
    assert wide.receive().frame == frame()


@pytest.mark.parametrize("count", [b"\0\0", b"\5\0", b"\1", b"\1\0\0"])
def test_an_impossible_number_of_pairs_is_refused(wide: Card, count: bytes) -> None:
    assert wide.command(4, 0, count) == net.ERR


def test_a_pair_whose_queues_are_not_set_up_is_refused(host: Namespace) -> None:
    card = Card(num_queues=4, start=False)
    card.driver.queue_sizes[3] = 0
    card.driver.start()
    assert card.command(4, 0, b"\2\0") == net.ERR
    assert card.command(4, 0, b"\1\0") == net.OK
    card.close()


def test_flows_are_spread_over_the_pairs(host: Namespace, wide: Card) -> None:
    """The host puts a flow where the guest sends it from."""
    assert wide.command(4, 0, b"\4\0") == net.OK
    sock = udp_on_host(host, wide)
    for pair in (2, 1, 3):
        wide.send(header() + udp_frame(b"ping", checksum=True), pair=pair)
        assert sock.recv(100) == b"ping"
        wide.offer(2048, pair=pair)
        sock.send(b"pong")
        assert wide.receive(pair).frame.endswith(b"pong")
    sock.close()


def test_without_mq_the_control_queue_comes_third(host: Namespace) -> None:
    card = Card(num_queues=4, features=PLAIN)
    head = card.driver.add([b"\0\0", b"\1"], [1], 2)
    os.eventfd_write(card.net.queues[2].kick_fd, 1)
    assert select.select([card.net.queues[4].kick_fd], [], [], 5)[0]
    card.driver.serve()
    assert [used.length for used in card.driver.wait(2)] == [1]
    assert card.driver.read(head, 2) == bytes([net.OK])
    card.close()


# -- the whole of a life --------------------------------------------------------------------------


def test_a_driver_may_start_again_and_again(card: Card) -> None:
    for round in range(20):
        card.driver.start()
        card.offer(2048)
        card.host.send(frame(b"%d" % round))
        assert card.receive().frame == frame(b"%d" % round)
    card.driver.reset()
    assert not card.net.pairs[0].running


def test_what_the_driver_asked_for_is_restored(wide: Card) -> None:
    wide.command(4, 0, b"\2\0")
    wide.command(1, 1, b"\2\0\0\0\0\5")
    wide.command(1, 0, b"\0\0\0\0\1\0\0\0" + b"\1\0\x5e\0\0\1")
    wide.command(5, 0, struct.pack("<Q", net.GUEST_CSUM))
    wide.command(0, 1, b"\1")
    state = wide.net.state()
    again = Card(num_queues=8, mac="2e:00:00:00:00:02", start=False, ip="10.0.0.1")
    again.net.restore(state)
    assert again.net.state() == state
    assert again.driver.read_config(0, 6) == b"\2\0\0\0\0\5"
    with pytest.raises(ValueError, match=r"^_net0: 5 queue pairs were saved, there are 4$"):
        again.net.restore({**state, "pairs": 5})
    again.close()


def test_the_mtu_is_set_and_told(host: Namespace) -> None:
    card = Card(mtu=4000)
    assert "mtu 4000" in host.ip("link", "show", card.net.tap.name)
    assert card.driver.offered & net.MTU
    assert struct.unpack("<H", card.driver.read_config(10, 2)) == (4000,)
    card.close()
    card = Card()
    assert not card.driver.offered & net.MTU
    card.close()


@pytest.mark.parametrize(
    ("switch", "gone"),
    [
        ("offload_csum", net.CSUM | net.HOST_TSO4 | net.GUEST_UFO),
        ("offload_tso", net.GUEST_TSO6),
        ("offload_ufo", net.HOST_UFO),
    ],
)
def test_offloads_can_be_withheld(host: Namespace, switch: str, gone: int) -> None:
    withheld: dict[str, Any] = {switch: False}
    card = Card(**withheld)
    assert card.driver.offered & gone == 0
    card.close()


def test_a_pause_leaves_no_chain_in_flight(card: Card) -> None:
    card.offer(100, count=50)
    card.host.send(frame(bytes(1000)))
    assert len(card.receive().frame) == 1014
    card.net.pause()
    state = card.net.queues[0].state()
    assert state["next_avail"] == state["next_used"] == 11
    card.host.send(frame(b"meanwhile"))
    card.net.resume()
    assert card.receive().frame == frame(b"meanwhile")


def test_what_is_received_is_marked_for_migration(card: Card) -> None:
    card.driver.memory.start_tracking()
    card.offer(100, 200, count=8)
    blocks = [block for head in range(0, 16, 2) for block in card.driver.rings[0].blocks(head)]
    card.driver.memory.take_dirty(0)
    card.host.send(frame(bytes(1000)))
    card.receive()
    bits = int.from_bytes(card.driver.memory.take_dirty(0), "little")
    dirty = {page for page in range(bits.bit_length()) if bits >> page & 1}
    filled = blocks[:7]  # 1026 bytes: three chains of 300, and a buffer of 100 and some of the next
    assert {block.gpa >> 12 for block in filled} <= dirty
    assert card.driver.rings[0].used_ring >> 12 in dirty


def test_an_interface_of_the_user_is_brought_up_and_else_left_alone(host: Namespace) -> None:
    host.ip("tuntap", "add", "name", "theirs", "mode", "tap")
    host.ip("link", "set", "theirs", "mtu", "3000")
    card = Card(tap="theirs", host_mac=None)
    assert "inet " not in host.ip("addr", "show", "theirs")
    assert "UP" in host.ip("link", "show", "theirs")
    assert card.driver.read_config(10, 2) == struct.pack("<H", 3000)
    card.command(1, 0, bytes(8))
    card.close()
    card = Card(tap="theirs", ip="10.5.6.7", mask="255.255.0.0", host_mac=None)
    assert "inet 10.5.6.7/16" in host.ip("addr", "show", "theirs")
    card.close()
    assert "inet 10.5.6.7/16" in host.ip("addr", "show", "theirs")
    host.ip("link", "del", "theirs")


def test_inherited_descriptors_serve_as_well(host: Namespace) -> None:
    fds = [os.open("/dev/net/tun", os.O_RDWR) for _ in range(2)]
    flags = tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR | tap.IFF_MULTI_QUEUE
    for fd in fds:
        fcntl.ioctl(fd, tap.TUNSETIFF, struct.pack("=16sH22x", b"theirs", flags))
    host.ip("link", "set", "theirs", "up")
    card = Card(fd=fds, host_mac=None)
    card.offer(2048)
    card.host.send(frame())
    assert card.receive().frame == frame()
    assert card.command(4, 0, b"\2\0") == net.OK
    card.close()
    again = Card(fd=fds, host_mac=None)  # after a reboot
    again.offer(2048)
    again.host.send(frame())
    assert again.receive().frame == frame()
    again.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mtu": 65521, "host_mac": "33:33:00:00:00:01"}, "cannot give the MAC address 33:33:00:00:00:01"),
        ({"ip": "224.0.0.1"}, "cannot give the address 224.0.0.1 to vmtap0: Invalid argument"),
        ({"tap": "lo"}, "cannot open TAP lo: lo is no TAP"),
        ({"fd": [9999]}, "cannot use fd 9999: it is not open"),
        ({"num_queues": 1000}, "cannot make TAP vmtap0: Argument list too long"),
    ],
)
def test_what_cannot_be_set_up_leaves_nothing(host: Namespace, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HostError) as caught:
        net.open_net(NetConfig(**config), 0)
    assert str(caught.value).startswith(sentence)


DESCRIPTORS = st.fixed_dictionaries(
    {
        "gpa": st.sampled_from([0x2000, 0x3FFF_F000, (64 << 20) - 100, 1 << 32, 1 << 40, (1 << 64) - 8]),
        "length": st.sampled_from([0, 1, 11, 12, 100, 2000, 70000, 1 << 31, (1 << 32) - 1]),
        "flags": st.integers(0, 7),
        "next": st.sampled_from([0, 1, 2, 3, 255, 256, 65535]),
    }
)


@given(
    table=st.lists(DESCRIPTORS, min_size=1, max_size=4),
    heads=st.lists(st.sampled_from([0, 1, 2, 3, 255, 256, 65535]), min_size=1, max_size=6),
    queue=st.sampled_from([0, 1]),
    jump=st.sampled_from([0, 0, 0, 1, 300, 40000]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_hostile_driver_harms_itself_alone(
    card: Card, table: list[dict[str, int]], heads: list[int], queue: int, jump: int
) -> None:
    """Whatever lies in its rings; after a reset the device works as if nothing had been."""
    for index, entry in enumerate(table):
        card.driver.write_descriptor(index, queue=queue, **entry)
    for head in heads:
        card.driver.offer(head, queue)
    card.driver.rings[queue].set_available(card.driver.rings[queue].next_available + jump)
    card.host.send(frame(bytes(1000)))
    card.driver.kick(queue)
    card.host.send(frame(bytes(100)))
    card.driver.start()
    card.came.clear()
    sent = frame(os.urandom(16).hex().encode())
    card.offer(4096, count=20)
    card.host.send(sent)
    while card.receive().frame != sent:
        pass
    card.send(header() + frame(to=HOST_MAC))


# -- an engine without a TAP: a socket that loses nothing and can be full ---------------------------


class Line(Card):
    """The pair's descriptor is one end of a pair of sockets; ``host`` is the other."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.settimeout(5)
        made = Tap("line", [ours.detach()])
        made.set_offloads = lambda offloads: None  # type: ignore[method-assign]
        os.set_blocking(made.fds[0], False)
        self.net = net.Net("line", made, GUEST_MAC)
        self.driver = FakeDriver(self.net, ranges=[(0, 64 << 20)])
        self.host, self.came = theirs, {}


def test_packets_wait_while_the_host_takes_none() -> None:
    line = Line()
    sent = [header() + frame(b"%d" % number + bytes(900)) for number in range(1000)]
    got = []
    for start in range(0, 1000, 200):
        for each in sent[start : start + 200]:
            line.driver.add(readable=[each], queue=1)
        line.driver.kick(1)
        if start:  # the socket holds fewer: the engine waits for it, and the driver for the engine
            got += [line.host.recv(2000) for _ in range(200)]
        else:
            until(lambda: asleep(line))
            assert len(line.driver.used(1)) < 200
            got += [line.host.recv(2000) for _ in range(200)]
        line.driver.used(1)
        until(lambda: line.driver.used(1) == [] and line.driver.rings[1].in_flight == 0)
    assert got == sent
    assert line.counter("tx_dropped") == 0
    line.close()


@given(
    lengths=st.lists(st.one_of(st.integers(12, 300), st.integers(12, 66000)), min_size=1, max_size=12),
    room=st.integers(300, 5000),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_small_and_large_packets_follow_one_another(lengths: list[int], room: int) -> None:
    """Whatever was guessed of each."""
    line = Line()
    try:
        sent = [os.urandom(10) + bytes(2) + os.urandom(length - 12) for length in lengths]
        for data in sent:
            line.host.send(data)
            line.offer(room, count=-(-len(data) // room))
            packet = line.receive()
            assert header(*packet[:6])[:10] + bytes(2) + packet.frame == data
    finally:
        line.close()


@pytest.mark.parametrize("length", [0, 1, 11])
def test_what_is_shorter_than_a_header_is_no_packet(length: int) -> None:
    line = Line()
    line.offer(2048)
    if length:
        line.host.send(bytes(length))
    line.host.send(header() + frame())
    assert line.receive().frame == frame()
    line.close()


# -- helpers --------------------------------------------------------------------------------------


def engine_stat(card: Card, index: int = 0) -> list[str]:
    """The fields after the name of the engine's thread in /proc, once it has that name."""
    name = card.net.pairs[index].name
    for task in Path("/proc/self/task").iterdir():
        text = (task / "stat").read_text()
        if f"({name[:15]})" in text:
            return text.rpartition(")")[2].split()
    return ["?"]


def asleep(card: Card) -> bool:
    """It has begun and has nothing more to do."""
    return engine_stat(card)[0] == "S"


def cpu_ticks(card: Card) -> int:
    stat = engine_stat(card)
    return int(stat[11]) + int(stat[12])

"""virtio-vsock between a guest in memory and Unix sockets."""

import hashlib
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from pileus.errors import HostError
from pileus.testing import F_WRITE
from pileus.virtio import status
from pileus.virtio.devices.vsock import BUFFER_SIZE, CONNECTION_LIMIT, open_vsock
from tests.unit.virtio.devices.vsock_guest import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENTS,
    HEADER,
    NO_RECEIVE,
    NO_SEND,
    NOTHING_MORE,
    PATIENCE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SHUTDOWN,
    TX,
    Guest,
    Socket,
)

PORT = 1234
MIB = 1 << 20
Boot = Callable[..., Guest]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))
    yield
    assert not (tmp_path / "vsock").exists()
    deadline = time.monotonic() + PATIENCE
    while sorted(os.listdir("/proc/self/task")) != before[1]:  # a thread that has ended takes a moment to go
        assert time.monotonic() < deadline
    assert sorted(os.listdir("/proc/self/fd")) == before[0]


@pytest.fixture
def boot(nothing_is_left: None, tmp_path: Path) -> Iterator[Boot]:
    guests: list[Guest] = []

    def boot(**options: object) -> Guest:
        guests.append(Guest(tmp_path, **options))  # type: ignore[arg-type]
        return guests[-1]

    yield boot
    for guest in guests:
        guest.close()


@pytest.fixture
def guest(boot: Boot) -> Guest:
    return boot()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def client_of(guest: Guest, line: bytes = b"CONNECT 1234\n") -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    client.connect(guest.path)
    with suppress(BrokenPipeError):  # the device may have closed it by now
        client.sendall(line)
    return client


def connect(guest: Guest, port: int = PORT) -> tuple[socket.socket, Socket]:
    """A connection from the host to the guest: its two ends."""
    if port not in guest.listeners:
        guest.listen(port)
    client = client_of(guest, b"CONNECT %d\n" % port)
    one = guest.accept(port)
    assert client.recv(64) == b"OK %d\n" % one.host_port
    return client, one


def listen(guest: Guest, port: int, backlog: int = 128) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(PATIENCE)
    listener.bind(f"{guest.path}_{port}")
    listener.listen(backlog)
    return listener


def reach(guest: Guest, listener: socket.socket, port: int = 53) -> tuple[socket.socket, Socket]:
    """A connection from the guest to ``listener``: its two ends."""
    one = guest.connect(port)
    guest.until(lambda: one.connected)
    host, _ = listener.accept()
    host.settimeout(PATIENCE)
    return host, one


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


# -- both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [True, False], ids=["EVENT_IDX", "flags"])
def test_a_client_of_the_host_talks_to_the_guest(boot: Boot, event_idx: bool) -> None:
    guest = boot(event_idx=event_idx)
    client, one = connect(guest)
    assert one.host_port >> 30 == 1
    for round in range(300):  # more than the ring has
        client.sendall(b"ping %d" % round)
        assert one.read_exactly(len(b"ping %d" % round)) == b"ping %d" % round
        one.write(b"pong %d" % round)
        assert client.recv(64) == b"pong %d" % round
    client.close()
    guest.until(lambda: one.was_reset)
    assert one.host_shut == NOTHING_MORE


def test_the_guest_talks_to_a_listener_of_the_host(guest: Guest) -> None:
    with listen(guest, 53) as listener:
        host, one = reach(guest, listener)
        with host:
            one.write(b"ping")
            assert host.recv(64) == b"ping"
            host.sendall(b"pong")
            assert one.read_exactly(4) == b"pong"
            one.close()
            assert host.recv(64) == b""


@pytest.mark.parametrize(
    "line", [b"connect 1234\n", b"Connect   1234\r\n", b"CONNECT 1234 \n", b"CONNECT 0000001234\n"]
)
def test_a_line_may_be_written_in_more_than_one_way(guest: Guest, line: bytes) -> None:
    guest.listen(PORT)
    with client_of(guest, line) as client:
        one = guest.accept(PORT)
        assert client.recv(64) == b"OK %d\n" % one.host_port


def test_a_line_may_come_byte_by_byte_and_with_data_behind_it(guest: Guest) -> None:
    guest.listen(PORT)
    with client_of(guest, b"") as client:
        for byte in b"CONNECT 1234":
            client.send(bytes([byte]))
            time.sleep(0.001)
        client.sendall(b"\nCONNECT 5678\nHello")
        one = guest.accept(PORT)
        assert one.read_exactly(18) == b"CONNECT 5678\nHello"


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT1234\n",
        b"CONNECT 12x4\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 12345678901\n",
        b"GET / HTTP/1.0\n",
        b"CONNECT 1234 5678\n",
        b"x" * 32,
        b"\0" * 4000,
    ],
)
def test_a_client_that_says_anything_else_is_closed(guest: Guest, line: bytes) -> None:
    with client_of(guest, line) as client:
        assert is_closed(client)
    assert guest.quiet()


@pytest.mark.parametrize("buffer", [45, 300, 4096, 70000])
def test_buffers_of_any_size_are_filled(boot: Boot, buffer: int) -> None:
    guest = boot(buffer=buffer, buffers=64)
    data = os.urandom(20_000)
    client, one = connect(guest)
    writer = threading.Thread(target=client.sendall, args=(data,))
    writer.start()
    assert one.read_exactly(len(data)) == data
    writer.join()
    client.close()


def test_headers_and_data_may_be_cut_anywhere(guest: Guest) -> None:
    """The guest's as well as the device's: older kernels have a buffer for each."""
    client, one = connect(guest)
    data = bytes(range(256)) * 3
    header = HEADER.pack(42, 2, one.port, one.host_port, len(data), 1, RW, 0, 1 << 16, 0)
    packet = header + data
    for cuts in ((1, 2, 50), (43, 44, 45), (44,), (20, 100, 101)):
        edges = [0, *cuts, len(packet)]
        guest.send_raw(*(packet[low:high] for low, high in pairwise(edges)))
        assert client.recv(4096) == data
    guest.driver.reset()
    client.close()


def test_old_kernels_give_header_and_data_a_buffer_each(boot: Boot) -> None:
    guest = boot(buffers=0)
    guest.listen(PORT)
    with client_of(guest, b"CONNECT 1234\nHello"):
        heads = [guest.driver.add(writable=[20, 24, 7, 9], queue=RX) for _ in range(2)]
        guest.driver.kick(RX)
        assert guest.driver.wait(RX)[0].length == 44
        fields = HEADER.unpack_from(guest.driver.read(heads[0], RX))
        guest.send(RESPONSE, fields[2], PORT)
        used = guest.driver.wait(RX)[0]
        assert guest.driver.read(used.head, RX)[44 : used.length] == b"Hello"


@pytest.mark.parametrize("size", [1 * MIB, 8 * MIB])
def test_megabytes_arrive_whole_both_ways_at_once(guest: Guest, size: int) -> None:
    data = os.urandom(size)
    digest = hashlib.sha256(data).digest()
    client, one = connect(guest)
    came = hashlib.sha256()

    def receive() -> None:
        left = size
        while left:
            part = client.recv(1 << 20)
            came.update(part)
            left -= len(part)

    threads = [threading.Thread(target=client.sendall, args=(data,)), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    arrived = hashlib.sha256()
    while one.read_count < size or one.sent_count < size:
        guest.until(lambda: one.data or (one.sent_count < size and one.credit))
        if part := one.read():
            arrived.update(part)
        if one.sent_count < size and one.credit:
            one.write(data[one.sent_count : one.sent_count + min(one.credit, 1 << 16)])
    for thread in threads:
        thread.join()
    assert arrived.digest() == came.digest() == digest
    assert guest.device.counters()["rx_bytes"] == guest.device.counters()["tx_bytes"] == size
    client.close()


@pytest.mark.usefixtures("many_descriptors")
def test_five_hundred_connections_at_once(guest: Guest) -> None:
    guest.listen(PORT)
    clients = [client_of(guest, b"CONNECT 1234\nhello %d" % number) for number in range(250)]
    with listen(guest, 53, backlog=5) as listener:  # so that most have to try again
        sockets = [guest.connect(53) for _ in range(250)]
        hosts: list[socket.socket] = []

        def accept() -> None:
            for _ in sockets:
                hosts.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        guest.until(lambda: all(one.connected for one in sockets) and len(guest.listeners[PORT]) == 250)
        thread.join()
        for one in sockets:
            one.write(b"from %d" % one.port)
        assert {host.recv(64) for host in hosts} == {b"from %d" % one.port for one in sockets}
        accepted = list(guest.listeners[PORT])
        guest.until(lambda: all(one.data for one in accepted))
        assert {one.read() for one in accepted} == {b"hello %d" % number for number in range(250)}
        assert guest.device.muxer.connections == 500
        for each in clients + hosts:
            each.close()
        guest.until(lambda: not guest.device.muxer.connections)


# -- endings --------------------------------------------------------------------------------------


def test_a_client_that_stops_sending_still_gets_the_answer(guest: Guest) -> None:
    client, one = connect(guest)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    guest.until(lambda: one.host_shut)
    assert one.host_shut == NO_SEND
    assert one.read() == b"question"
    one.write(b"answer")
    assert client.recv(64) == b"answer"
    one.close()
    assert client.recv(64) == b""
    client.close()


def test_a_guest_that_stops_sending_still_gets_the_answer(guest: Guest) -> None:
    client, one = connect(guest)
    one.write(b"question")
    one.shutdown(NO_SEND)
    assert client.recv(64) == b"question"
    assert client.recv(64) == b""
    client.sendall(b"answer")
    assert one.read_exactly(6) == b"answer"
    client.close()
    guest.until(lambda: one.was_reset)


def test_a_guest_that_stops_receiving_can_still_send(guest: Guest) -> None:
    client, one = connect(guest)
    one.shutdown(NO_RECEIVE)
    guest.sent()
    with pytest.raises(BrokenPipeError):
        client.sendall(b"nobody listens")
    one.write(b"still here")
    assert client.recv(64) == b"still here"
    client.close()
    guest.until(lambda: one.was_reset)


def test_what_a_client_sent_before_it_left_arrives(guest: Guest) -> None:
    client, one = connect(guest)
    data = os.urandom(100_000)  # more than the guest takes unread
    client.sendall(data)
    client.close()
    assert one.read_exactly(len(data)) == data
    guest.until(lambda: one.was_reset)


def test_what_a_guest_sent_before_it_closed_arrives(guest: Guest) -> None:
    client, one = connect(guest)
    data = os.urandom(BUFFER_SIZE)  # more than a socket holds unread
    one.write(data)
    one.close()
    assert guest.device.muxer.connections == 1
    time.sleep(0.05)
    came = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert came == data
    client.close()
    guest.until(lambda: not guest.device.muxer.connections)


def test_a_client_that_reads_nothing_of_it_is_not_waited_for_forever(boot: Boot) -> None:
    guest = boot(linger_ms=50)
    client, one = connect(guest)
    one.write(bytes(BUFFER_SIZE))
    one.close()
    guest.until(lambda: not guest.device.muxer.connections)
    client.close()


def test_a_client_that_leaves_without_reading_resets(guest: Guest) -> None:
    client, one = connect(guest)
    one.write(b"never read")
    guest.sent()
    client.close()
    guest.until(lambda: one.was_reset)


def test_a_client_that_leaves_amid_a_transfer_stops_the_guest(guest: Guest) -> None:
    client, one = connect(guest)
    one.write(bytes(BUFFER_SIZE))
    guest.sent()
    client.close()
    guest.until(lambda: one.host_shut & NO_RECEIVE or one.was_reset)
    guest.until(lambda: one.was_reset)


def test_a_guest_that_refuses_closes_the_client(guest: Guest) -> None:
    with client_of(guest) as client:
        guest.step()  # nobody listens
        assert client.recv(64) == b""


def test_a_listener_that_does_not_exist_resets(guest: Guest) -> None:
    one = guest.connect(4096)
    guest.until(lambda: one.was_reset)
    assert not one.connected


def test_a_guest_that_resets_closes_the_client(guest: Guest) -> None:
    client, one = connect(guest)
    one.abort()
    assert is_closed(client)
    client.close()


# -- limits and times -----------------------------------------------------------------------------


def test_a_guest_that_does_not_answer_closes_the_client_in_time(boot: Boot) -> None:
    guest = boot(guest_ms=50)
    with client_of(guest) as client:
        request = guest.expect(REQUEST)
        assert client.recv(64) == b""
        reset = guest.expect(RST)
        assert reset.src_port == request.src_port


def test_a_guest_that_does_not_end_a_connection_gets_a_reset_in_time(boot: Boot) -> None:
    guest = boot(guest_ms=50)
    client, one = connect(guest)
    client.close()
    packet = guest.expect(SHUTDOWN)
    assert packet.flags == NOTHING_MORE
    assert guest.expect(RST).dst_port == one.port


def test_a_guest_without_buffers_holds_nothing_for_long(boot: Boot) -> None:
    guest = boot(guest_ms=50, buffers=0)
    with client_of(guest) as client:
        assert client.recv(64) == b""
    assert guest.device.muxer.connections == 0
    guest.offer(4)
    assert guest.quiet()  # it never heard of the request


def test_a_client_that_names_no_port_is_closed_in_time(boot: Boot) -> None:
    guest = boot(line_ms=50)
    with client_of(guest, b"CONNECT 12") as client:
        assert is_closed(client)


def test_a_full_backlog_is_not_tried_for_ever(boot: Boot) -> None:
    guest = boot(guest_ms=60)
    with listen(guest, 53, backlog=0):
        sockets = [guest.connect(53) for _ in range(3)]
        guest.until(lambda: all(one.connected or one.was_reset for one in sockets))
        assert [one.connected for one in sockets] == [True, False, False]
        assert sockets[1].was_reset


@pytest.mark.usefixtures("many_descriptors")
def test_there_is_a_limit_of_connections(guest: Guest) -> None:
    if int(Path("/proc/sys/net/core/somaxconn").read_text()) < CONNECTION_LIMIT:
        pytest.skip("this host's backlogs are short")
    with listen(guest, 53, backlog=2 * CONNECTION_LIMIT):
        sockets = [guest.connect(53) for _ in range(CONNECTION_LIMIT + 5)]
        guest.until(lambda: all(one.connected or one.was_reset for one in sockets))
        assert sum(one.connected for one in sockets) == CONNECTION_LIMIT
        with client_of(guest, b"") as client:
            assert is_closed(client)
        assert guest.device.counters()["refused"] == 6
        sockets[0].close()
        client, _ = connect(guest)
        client.close()


def test_a_guest_without_credit_gets_nothing_and_is_asked_once(guest: Guest) -> None:
    guest.listen(PORT)
    with client_of(guest, b"CONNECT 1234\nHello") as client:
        request = guest.expect(REQUEST)
        ports = request.src_port, PORT
        guest.send(RESPONSE, *ports, buf_alloc=0)
        guest.expect(CREDIT_REQUEST)
        for _ in range(5):
            guest.send(CREDIT_UPDATE, *ports, buf_alloc=0)
        assert guest.quiet()
        guest.send(CREDIT_UPDATE, *ports, buf_alloc=2)
        assert guest.expect(RW).payload == b"He"
        guest.expect(CREDIT_REQUEST)
        guest.send(CREDIT_UPDATE, *ports, buf_alloc=2, fwd_cnt=7)  # more than it ever got
        assert guest.quiet()
        guest.send(CREDIT_UPDATE, *ports, buf_alloc=2, fwd_cnt=2)
        assert guest.expect(RW).payload == b"ll"
        client.settimeout(PATIENCE)


def test_a_guest_hears_of_credit_before_it_has_none(guest: Guest) -> None:
    client, one = connect(guest)
    one.write(bytes(200_000), most=50_000)
    assert guest.expect(CREDIT_UPDATE).fwd_cnt >= 128 << 10
    one.say(CREDIT_REQUEST)
    assert guest.expect(CREDIT_UPDATE).buf_alloc == BUFFER_SIZE
    client.close()


def test_a_guest_that_sends_more_than_it_may_is_reset(guest: Guest) -> None:
    client, one = connect(guest)
    for _ in range(12):  # a socket holds some of it
        one.say(RW, bytes(64 << 10))
    guest.until(lambda: one.was_reset)
    client.close()


def test_a_slow_client_does_not_hold_up_another(guest: Guest) -> None:
    slow, one = connect(guest)
    fast, other = connect(guest)
    one.write(bytes(BUFFER_SIZE))
    other.write(b"quick")
    assert fast.recv(64) == b"quick"
    slow.close()
    fast.close()


def test_an_idle_device_sleeps(guest: Guest) -> None:
    client, one = connect(guest)
    one.write(bytes(BUFFER_SIZE))  # which the client does not read
    guest.sent()
    idle = threads_time()
    time.sleep(0.3)
    assert threads_time() - idle < 0.05
    client.close()


def threads_time() -> float:
    """Seconds of CPU that this process took, all threads."""
    times = os.times()
    return times.user + times.system


def test_without_descriptors_new_connections_wait_or_fail(guest: Guest) -> None:
    client, one = connect(guest)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    other = socket.socket(socket.AF_UNIX)
    other.settimeout(PATIENCE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        other.connect(guest.path)
        other.sendall(b"CONNECT 1234\n")
        failed = guest.connect(53)
        guest.until(lambda: failed.was_reset)
        idle = threads_time()
        time.sleep(0.2)
        assert threads_time() - idle < 0.05
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    one.close()  # which frees one
    again = guest.accept(PORT)
    assert other.recv(64) == b"OK %d\n" % again.host_port
    other.close()
    client.close()


# -- life -----------------------------------------------------------------------------------------


def test_a_guest_that_boots_again_finds_no_connection(guest: Guest) -> None:
    client, one = connect(guest)
    with listen(guest, 53) as listener:
        host, _ = reach(guest, listener)
        guest.driver.reset()
        assert is_closed(client)
        assert is_closed(host)
        client.close()
        host.close()
        guest.start()
        guest.send(RW, one.host_port, one.port, b"of old")
        assert guest.expect(RST).dst_port == one.port
        again, _ = connect(guest)
        again.close()


def test_a_client_that_comes_before_the_driver_is_served_once_it_is_there(boot: Boot) -> None:
    guest = boot(start=False)
    with client_of(guest) as client:
        guest.listen(PORT)
        guest.start()
        guest.accept(PORT)
        assert client.recv(64).startswith(b"OK ")


def test_connections_outlive_a_pause(guest: Guest) -> None:
    client, one = connect(guest)
    with guest.device.lock:
        guest.device.muxer.stop()
    client.sendall(b"meanwhile")
    assert guest.quiet()
    guest.device.muxer.start()
    assert one.read_exactly(9) == b"meanwhile"
    client.close()


def test_a_pause_takes_no_time_from_whoever_has_to_answer(boot: Boot) -> None:
    guest = boot(guest_ms=300)
    guest.listen(PORT)
    with client_of(guest) as client:
        request = guest.expect(REQUEST)
        guest.device.muxer.stop()
        time.sleep(0.4)
        guest.device.muxer.start()
        guest.send(RESPONSE, request.src_port, PORT)
        assert client.recv(64) == b"OK %d\n" % request.src_port


def test_a_restored_guest_hears_that_its_connections_are_gone(guest: Guest) -> None:
    guest.driver.add(writable=[8], queue=EVENTS)
    guest.driver.kick(EVENTS)
    assert guest.driver.used(EVENTS) == []
    guest.start_restored()
    head = guest.driver.add(writable=[8], queue=EVENTS)
    guest.driver.add(writable=[8], queue=EVENTS)
    guest.driver.kick(EVENTS)
    assert [(used.head, used.length) for used in guest.driver.used(EVENTS)] == [(head, 4)]
    assert guest.driver.read(head, EVENTS)[:4] == bytes(4)


def test_the_configuration_is_the_cid(guest: Guest) -> None:
    assert guest.driver.read_config() == (42).to_bytes(8, "little")
    assert guest.device.offered & 1


def test_the_socket_is_for_this_user_alone(guest: Guest) -> None:
    assert os.lstat(guest.path).st_mode & 0o777 == 0o600


def test_a_device_without_a_receive_queue_harms_nobody(boot: Boot) -> None:
    guest = boot(queue_sizes=[0, 64, 0], buffers=0)
    guest.send(REQUEST, 53, 1)
    guest.sent()
    with client_of(guest):
        assert not guest.driver.status & status.NEEDS_RESET


# -- the socket's file ----------------------------------------------------------------------------


def test_a_stale_socket_is_replaced_a_live_one_refused(boot: Boot, tmp_path: Path) -> None:
    from pileus.config.model import VsockConfig

    config = VsockConfig(cid=3, socket=str(tmp_path / "vsock"))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(config.socket)
    device = open_vsock(config)
    with pytest.raises(HostError, match=r"^cannot listen on .*/vsock: another process does$"):
        open_vsock(config)
    device.close()
    (tmp_path / "vsock").write_text("precious")
    with pytest.raises(HostError, match=r"^cannot listen on .*: it exists and is not a socket$"):
        open_vsock(config)
    (tmp_path / "vsock").unlink()
    with pytest.raises(HostError, match=r"^cannot listen on .*: No such file or directory$"):
        open_vsock(VsockConfig(cid=3, socket=str(tmp_path / "none" / "vsock")))


def test_another_socket_in_its_place_stays(boot: Boot, guest: Guest, tmp_path: Path) -> None:
    os.unlink(guest.path)
    Path(guest.path).touch()
    guest.close()
    assert Path(guest.path).exists()
    os.unlink(guest.path)


# -- misconduct -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xFFFF])
def test_a_packet_for_no_connection_is_answered_with_a_reset(guest: Guest, op: int) -> None:
    guest.send(op, 7, 8)
    packet = guest.expect(RST)
    assert (packet.src_port, packet.dst_port, packet.length) == (7, 8, 0)


def test_a_reset_is_not_answered(guest: Guest) -> None:
    guest.send(RST, 7, 8)
    guest.send(RST, 7, 8, type=9)
    assert guest.quiet()


@pytest.mark.parametrize("op", [REQUEST, RW])
def test_a_type_that_is_not_offered_is_reset_as_what_it_is(guest: Guest, op: int) -> None:
    guest.send(op, 7, 8, type=2)
    assert guest.expect(RST).type == 2


def test_packets_of_others_and_to_others_are_dropped(guest: Guest) -> None:
    guest.send(REQUEST, 7, 8, cid=41)
    guest.send(REQUEST, 7, 8, cid=42 | 1 << 32)
    guest.send(REQUEST, 7, 8, dst_cid=1)
    guest.send(REQUEST, 7, 8, dst_cid=42)
    guest.send_raw(b"short")
    guest.driver.add(writable=[64], queue=TX)
    guest.driver.kick(TX)
    guest.sent()
    assert guest.quiet()
    assert guest.device.counters()["dropped"] == 6


@pytest.mark.parametrize(
    "packet",
    [
        {"op": RW, "length": 1},
        {"op": RW, "payload": b"abc", "length": 4},
        {"op": RW, "payload": b"abc", "length": 0xFFFFFFFF},
        {"op": RESPONSE},
        {"op": REQUEST},
        {"op": 0},
        {"op": 99},
    ],
)
def test_a_senseless_packet_ends_its_connection_alone(guest: Guest, packet: dict[str, object]) -> None:
    client, one = connect(guest)
    other, another = connect(guest)
    guest.send(host_port=one.host_port, port=one.port, **packet)  # type: ignore[arg-type]
    guest.until(lambda: one.was_reset)
    assert is_closed(client)
    another.write(b"fine")
    assert other.recv(64) == b"fine"
    client.close()
    other.close()


def test_data_after_the_end_is_an_error(guest: Guest) -> None:
    client, one = connect(guest)
    one.shutdown(NO_SEND)
    one.say(RW, b"more")
    guest.until(lambda: one.was_reset)
    assert client.recv(64) == b""
    client.close()


def test_an_answer_before_the_question_is_an_error(boot: Boot) -> None:
    """The guest can guess the port that is next."""
    guest = boot(buffers=0)
    with client_of(guest) as client:
        deadline = time.monotonic() + PATIENCE
        while not guest.device.muxer.connections:
            assert time.monotonic() < deadline
        guest.send(RESPONSE, 1 << 30, PORT)
        assert client.recv(64) == b""


@pytest.mark.parametrize(
    ("buffer", "reason"), [({"length": 44, "flags": F_WRITE}, "no room"), ({"length": 99}, "not for")]
)
def test_a_bad_receive_buffer_stops_the_device(
    boot: Boot, buffer: dict[str, int], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    guest = boot(buffers=0)
    client = client_of(guest, b"")
    guest.driver.write_descriptor(0, gpa=0, queue=RX, **buffer)
    guest.driver.offer(0, RX)
    guest.driver.kick(RX)
    guest.send(RW, 7, 8)
    deadline = time.monotonic() + PATIENCE
    while not guest.driver.status & status.NEEDS_RESET:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    fault = guest.device.muxer.fault
    assert fault is not None
    assert reason in fault
    assert is_closed(client)
    client.close()


def test_a_guest_that_reads_no_resets_cannot_send_more(boot: Boot) -> None:
    guest = boot(buffers=0)
    ring = guest.driver.rings[TX]
    for _ in range(5):
        for _ in range(200):
            guest.driver.add(readable=[HEADER.pack(42, 2, 8, 7, 0, 1, RW, 0, 0, 0)], queue=TX)
        guest.driver.kick(TX)
        guest.driver.wait(TX, 200)
    for _ in range(200):
        guest.driver.add(readable=[HEADER.pack(42, 2, 8, 7, 0, 1, RW, 0, 0, 0)], queue=TX)
    guest.driver.kick(TX)
    time.sleep(0.1)
    guest.driver.used(TX)
    assert ring.in_flight == 1200 - 1024
    guest.offer(128)
    for _ in range(1200):
        guest.expect(RST)
    guest.sent()


# -- programs that nobody here wrote ----------------------------------------------------------------


def test_socat_talks_to_the_guest(guest: Guest) -> None:
    guest.listen(16)
    with subprocess.Popen(
        ["socat", "-", f"UNIX-CONNECT:{guest.path}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as socat:
        assert socat.stdin
        assert socat.stdout
        socat.stdin.write(b"CONNECT 16\nHelloWorld!\n")
        socat.stdin.close()
        one = guest.accept(16)
        assert one.read_exactly(12) == b"HelloWorld!\n"
        one.write(b"Hello yourself!\n")
        one.close()
        assert socat.stdout.read() == b"OK %d\nHello yourself!\n" % one.host_port


def test_the_guest_talks_to_socat(guest: Guest) -> None:
    path = f"{guest.path}_53"
    with subprocess.Popen(["socat", f"UNIX-LISTEN:{path},fork,backlog=1", "EXEC:cat"]) as socat:
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(path):
            assert time.monotonic() < deadline
        sockets = [guest.connect(53) for _ in range(8)]
        guest.until(lambda: all(one.connected for one in sockets))
        for one in sockets:
            one.write(b"%d" % one.port)
            assert one.read_exactly(5) == b"%d" % one.port
            one.close()
        socat.terminate()

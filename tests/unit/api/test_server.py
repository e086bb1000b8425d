"""The server and its clients: the slow, the broken, the hostile and the many."""

import array
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.api import server as module
from pileus.api.http import Request, Response
from pileus.api.server import MAX_CLIENTS, Server
from pileus.config.model import ApiSocketConfig
from pileus.errors import ConfigError, HostError, PileusError
from tests.unit import tiny
from tests.unit.api.harness import Api, Client, connect
from tests.unit.api.test_http import GET, PUT

PING = b"HTTP/1.1 200 \r\n"


@pytest.fixture
def raw(api: Api) -> Iterator[socket.socket]:
    with connect(api.path) as connection:
        yield connection


def receive(connection: socket.socket, ends: int = 1) -> bytes:
    """What comes until ``ends`` bodies have come."""
    data = b""
    while data.count(b"]}") < ends:
        piece = connection.recv(4096)
        assert piece, data
        data += piece
    return data


def is_served(api: Api) -> bool:
    return api.client().get("vmm.ping")[0] == 200


def test_the_ping_says_who_answers(client: Client) -> None:
    status, body = client.get("vmm.ping")
    assert status == 200
    assert body["pid"] == os.getpid()
    assert body["version"].split(".")[0].isdecimal()
    assert isinstance(body["build_version"], str)
    assert isinstance(body["features"], list)


def test_a_request_in_single_bytes_is_answered(raw: socket.socket) -> None:
    for byte in GET:
        raw.send(bytes([byte]))
    assert receive(raw).startswith(PING)


def test_requests_are_pipelined_and_the_connection_stays(raw: socket.socket) -> None:
    for _ in range(3):
        raw.send(GET * 100)
        assert receive(raw, 100).count(PING) == 100


def test_who_closes_its_half_gets_its_answers(raw: socket.socket) -> None:
    raw.send(GET * 5)
    raw.shutdown(socket.SHUT_WR)
    assert receive(raw, 5).count(PING) == 5
    assert raw.recv(1) == b""


def test_who_leaves_at_any_byte_harms_nobody(api: Api) -> None:
    for length in range(len(PUT)):
        with connect(api.path) as connection:
            connection.send(PUT[:length])
    assert is_served(api)
    assert api.client().get("vm.info")[0] == 404


HOSTILE = {
    "a header without an end": b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20),
    "no newline": b"a" * (1 << 20),
    "a body of 1 GiB": PUT.replace(b": 7", b": 1073741824") + bytes(1 << 20),
    "noise": bytes(range(256)) * 4096,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_nonsense_costs_its_sender_the_connection_and_nobody_else_anything(
    api: Api, raw: socket.socket, data: bytes
) -> None:
    try:
        raw.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was cut short
    answer = b""
    try:
        while piece := raw.recv(4096):
            answer += piece
    except ConnectionResetError:
        pass
    assert answer.startswith(b"HTTP/1.1 4")
    assert is_served(api)


def test_who_does_not_read_is_asked_no_more(api: Api, raw: socket.socket) -> None:
    raw.setblocking(False)
    sent = 0
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            sent += raw.send(GET * 100)
        except BlockingIOError:
            if is_served(api) and time.monotonic() > deadline - 4:
                break
    assert sent < 64 << 20
    assert is_served(api)


def test_who_is_late_is_closed_and_who_is_idle_is_not(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    monkeypatch.setattr(module, "SWEEP", 0.1)
    with connect(api.path) as idle, connect(api.path) as late, connect(api.path) as trickle:
        idle.send(GET)
        receive(idle)
        late.send(GET[:-1])
        try:
            for byte in GET[:-1]:
                trickle.send(bytes([byte]))
                time.sleep(0.03)
        except BrokenPipeError:
            pass
        assert late.recv(1) == b""
        assert trickle.recv(1) == b""
        idle.send(GET)
        assert receive(idle).startswith(PING)


def test_fifty_clients_at_once_get_their_own_answers(api: Api) -> None:
    failures: list[object] = []

    def converse(number: int) -> None:
        client = api.client()
        for turn in range(20):
            if (status := client.get("vmm.ping")[0]) != 200:
                failures.append(status)
            if (got := client.get(f"nothing.{number}.{turn}")) != (
                404,
                [f"There is nothing at /api/v1/nothing.{number}.{turn}."],
            ):
                failures.append(got)
        client.close()

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_more_clients_than_there_is_room_for_push_out_the_idle(api: Api) -> None:
    clients = [connect(api.path) for _ in range(MAX_CLIENTS + 20)]
    clients[-1].send(GET)
    assert receive(clients[-1]).startswith(PING)
    assert clients[0].recv(1) == b""
    for client in clients:
        client.close()


def test_an_idle_server_does_not_wake(api: Api, raw: socket.socket) -> None:
    raw.send(GET)
    receive(raw)
    task = next(
        each for each in Path("/proc/self/task").iterdir() if (each / "comm").read_text() == "http-server\n"
    )

    def switches() -> list[str]:
        return [line for line in (task / "status").read_text().splitlines() if "ctxt_switches" in line]

    time.sleep(0.1)
    before = switches()
    time.sleep(0.5)
    assert switches() == before


def test_descriptors_that_nobody_wants_are_closed(api: Api, raw: socket.socket) -> None:
    is_served(api)
    read_end, write_end = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end] * 200))]
    for _ in range(5):
        raw.sendmsg([GET[:20]], rights)
        raw.send(GET[20:])
        receive(raw)
    raw.sendmsg([GET[:20]], rights)
    os.close(write_end)
    raw.close()
    assert os.read(read_end, 1) == b"", "no copy of the other end is left"
    os.close(read_end)


def test_the_socket_is_for_its_owner_and_gone_in_the_end(tmp_path: Path, fake_vms: list[object]) -> None:
    path = tmp_path / "api"
    with Api(path) as api:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert is_served(api)
    assert (api.status, api.error) == (0, None)
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path, fake_vms: list[object]) -> None:
    path = tmp_path / "api"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with Api(path) as api:
        with Api(path) as second:
            second.join()
            assert isinstance(second.error, HostError)
            assert str(second.error) == f"cannot listen on {path}: another process does"
        assert is_served(api)
    path.write_text("mine")
    with Api(path) as third:
        third.join()
    assert isinstance(third.error, PileusError)
    assert path.read_text() == "mine"


def pong(_: Request, respond: object) -> None:
    respond(Response(200, {"features": []}))  # type: ignore[operator]


def test_an_inherited_socket_is_served(tmp_path: Path) -> None:
    path = tmp_path / "api"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = Server(ApiSocketConfig(fd=os.dup(listener.fileno())), pong)
        with connect(path) as connection:
            connection.send(GET)
            assert receive(connection).startswith(PING)
        server.close()
    assert path.exists(), "who made it removes it"


def test_a_descriptor_that_does_not_listen_is_refused() -> None:
    pair = socket.socketpair()
    tcp = socket.create_server(("127.0.0.1", 0))
    with open("/dev/null") as null:
        for fd in (pair[0].fileno(), tcp.fileno(), null.fileno(), 999):
            with pytest.raises(ConfigError, match=f"--api-socket fd {fd}: an open Unix stream socket"):
                Server(ApiSocketConfig(fd=fd), pong)
            assert fd == 999 or os.fstat(fd)
    for each in (*pair, tcp):
        each.close()


def test_servers_leave_nothing(tmp_path: Path) -> None:
    def once() -> None:
        server = Server(ApiSocketConfig(path=str(tmp_path / "api")), pong)
        with connect(tmp_path / "api") as one, connect(tmp_path / "api") as other:
            one.send(GET)
            receive(one)
            other.send(GET[:5])
            server.close()

    once()
    before = tiny.held()[:2]
    for _ in range(20):
        once()
    assert tiny.held()[:2] == before


def test_curl_is_answered(api: Api) -> None:
    words = ["curl", "-s", "--unix-socket", str(api.path), "-w", "%{http_code}\n", "--max-time", "20"]
    url = "http://localhost/api/v1/"
    done = subprocess.run([*words, url + "vmm.ping"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("}200\n")
    big = '{"payload": {"kernel": "/k"}%s}' % (" " * 100_000)  # large enough for Expect: 100-continue
    words = [*words, "-X", "PUT", "-H", "Expect: 100-continue", "-d", "@-", url + "vm.create"]
    done = subprocess.run(words, input=big, capture_output=True, text=True, check=True)
    assert done.stdout == "204\n"


NOTHING_EARLY = """
import sys
import pileus.cli.main, pileus.vmm.vmm
print(*sorted(name for name in sys.modules if name.startswith(("pileus.api", "h11", "json", "socket"))))
"""


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", NOTHING_EARLY], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"

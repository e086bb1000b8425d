"""AF_VSOCK in a Debian guest, Unix sockets and socat on the host."""

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.conftest import NewNetwork
from tests.guest.system import System, new_folder, why_not

pytestmark = [pytest.mark.needs("--vsock", "--disk"), pytest.mark.xdist_group("vsock")]

MIB = 1 << 20
BULK = (
    int(os.environ.get("PILEUS_VSOCK_MIB", "1024")) * MIB
)  # an emulated machine takes a minute or two for it
MANY = 500
PATIENCE = 300.0
SERVER = """
import hashlib, os, socket, sys, threading

def serve(connection):
    with connection:
        line = b""
        while not line.endswith(b"\\n"):
            line += connection.recv(1) or b"\\n"
        what, _, count = line.decode().strip().partition(" ")
        if what == "echo":
            while data := connection.recv(65536):
                connection.sendall(data)
        elif what == "sum":
            digest = hashlib.sha256()
            while data := connection.recv(1 << 20):
                digest.update(data)
            connection.sendall(digest.hexdigest().encode())
        elif what == "give":
            block, digest = os.urandom(1 << 20), hashlib.sha256()
            for _ in range(int(count) >> 20):
                connection.sendall(block)
                digest.update(block)
            connection.sendall(digest.digest())

server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
server.bind((socket.VMADDR_CID_ANY, 1024))
server.listen(1024)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
"""
CALLER = """
import socket, sys
port, count, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
sockets = []
for number in range(count):
    one = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    one.connect((socket.VMADDR_CID_HOST, port))
    sockets.append(one)
for one in sockets:
    one.sendall(text)
for one in sockets:
    one.shutdown(socket.SHUT_WR)
for one in sockets:
    data = b"".join(iter(lambda: one.recv(65536), b""))
    assert data == text, data
print("all", count)
"""


@dataclass
class Host:
    """A guest with CID 3 and a server on its port 1024; Unix sockets of the host are in ``folder``."""

    system: System
    folder: Path

    def path(self, port: int | None = None) -> str:
        """The socket of the guest, or the one that its connections to a port of the host go to."""
        return str(self.folder / ("s" if port is None else f"s_{port}"))

    def serve(self) -> None:
        check = self.system.check
        for name, text in (("server", SERVER), ("caller", CALLER)):
            check(f"cat >/root/{name}.py <<'END'\n{text}\nEND")
        check("modprobe vmw_vsock_virtio_transport; rm -f /root/server.log")
        check("setsid python3 /root/server.py >/root/server.log 2>&1 </dev/null &\n")
        check("until grep -qs ready /root/server.log; do sleep 0.2; done")

    def call(self, what: str, port: int = 1024) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        try:
            client.connect(self.path())
            client.sendall(f"CONNECT {port}\n{what}\n".encode())
            answer = b""
            while not answer.endswith(b"\n"):
                if not (got := client.recv(1)):
                    raise ConnectionRefusedError(answer)
                answer += got
        except OSError:
            client.close()
            raise
        assert answer.startswith(b"OK ")
        return client


@pytest.fixture(scope="module")
def host(network: NewNetwork) -> Iterator[Host]:
    if reason := why_not():
        pytest.skip(reason)
    images, folder = new_folder(), Path(tempfile.mkdtemp(prefix="vsock-"))
    try:
        more = ("--vsock", f"cid=3,socket={folder / 's'}")
        with System([network()], images, cpus="2", more=more) as system:
            host = Host(system.connect(), folder)
            host.serve()
            yield host
            assert system.power_off() == 0
        assert not (folder / "s").exists()
    finally:
        shutil.rmtree(images)
        shutil.rmtree(folder)


def all_of(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 20), b""))


def test_virtio_vsock(host: Host) -> None:
    """The reference's test of this name: socat at both ends."""
    host.system.check("setsid socat -u VSOCK-LISTEN:16 CREATE:/root/vsock_log >/dev/null 2>&1 </dev/null &\n")
    command = ["socat", "-t", "30", "-", f"UNIX-CONNECT:{host.path()}"]
    deadline, said = time.monotonic() + PATIENCE, b""
    while not said.startswith(b"OK ") and time.monotonic() < deadline:  # until socat listens
        done = subprocess.run(
            command, input=b"CONNECT 16\nHelloWorld!\n", capture_output=True, check=False, timeout=PATIENCE
        )
        said = done.stdout
    assert said.startswith(b"OK ")
    assert host.system.check("cat /root/vsock_log") == "HelloWorld!"


def test_echo_and_the_cid(host: Host) -> None:
    with host.call("echo") as client:
        client.sendall(b"ping")
        assert client.recv(64) == b"ping"
        client.shutdown(socket.SHUT_WR)
        assert all_of(client) == b""
    get = (
        "import fcntl,struct; print(struct.unpack('I', fcntl.ioctl(open('/dev/vsock'), 0x7b9, bytes(4)))[0])"
    )
    assert host.system.check(f'python3 -c "{get}"') == "3"


def test_the_guest_calls_socat_of_the_host(host: Host) -> None:
    with subprocess.Popen(["socat", f"UNIX-LISTEN:{host.path(53)},fork", "EXEC:cat"]) as socat:
        try:
            assert host.system.check("python3 /root/caller.py 53 20 hello") == "all 20"
        finally:
            socat.terminate()


@pytest.mark.long
def test_much_data_to_the_guest(host: Host) -> None:
    block, digest = os.urandom(MIB), hashlib.sha256()
    with host.call("sum") as client:
        for _ in range(BULK // MIB):
            client.sendall(block)
            digest.update(block)
        client.shutdown(socket.SHUT_WR)
        assert all_of(client).decode() == digest.hexdigest()


@pytest.mark.long
def test_much_data_from_the_guest(host: Host) -> None:
    digest, last = hashlib.sha256(), b""
    with host.call(f"give {BULK}") as client:
        while data := client.recv(MIB):
            last += data
            digest.update(last[:-32])
            last = last[-32:]
    assert digest.digest() == last


def test_five_hundred_connections_at_once(host: Host) -> None:
    clients = [host.call("echo") for _ in range(MANY // 2)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.path(54))
        listener.listen(5)

        def echo(peer: socket.socket) -> None:
            with peer:
                peer.sendall(all_of(peer))

        def accept() -> None:
            for _ in range(MANY // 2):
                threading.Thread(target=echo, args=(listener.accept()[0],)).start()

        thread = threading.Thread(target=accept)
        thread.start()
        assert (
            host.system.check(f"ulimit -n 4096; python3 /root/caller.py 54 {MANY // 2} hello")
            == f"all {MANY // 2}"
        )
        thread.join()
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    for number, client in enumerate(clients):
        assert client.recv(64) == b"%d" % number
        client.close()


def test_nobody_listens_on_either_side(host: Host) -> None:
    # A reset where the host had not read all that came before it closed the connection.
    with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
        host.call("echo", port=4096)
    assert "ConnectionResetError" in host.system.run("python3 /root/caller.py 4096 1 hello").stderr


def test_peers_that_vanish(host: Host) -> None:
    for _ in range(20):
        host.call(f"give {64 * MIB}").close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.path(55))
        listener.listen(1)
        host.system.run("timeout -s KILL 5 socat -u /dev/zero VSOCK-CONNECT:2:55")
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(PATIENCE)
            assert all_of(peer).strip(b"\0") == b""
    with host.call("echo") as client:
        client.sendall(b"fine")
        assert client.recv(64) == b"fine"


def test_a_reboot_ends_connections_and_new_ones_work(host: Host) -> None:
    client = host.call("echo")
    host.system.reboot()
    with suppress(ConnectionResetError):
        assert client.recv(64) == b""
    client.close()
    host.serve()
    with host.call("echo") as client:
        client.sendall(b"again")
        assert client.recv(64) == b"again"

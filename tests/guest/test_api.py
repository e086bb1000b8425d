"""The HTTP API leads a Debian guest through its life, by curl: twins of the reference's tests 29 and 30."""

import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import NewNetwork
from tests.guest.guest import TRIXIE_PVH, Guest
from tests.guest.system import QUIET, Network, System, copy_of_root, new_folder, why_not
from tests.guest.test_reference import ENTROPY, SMALL_MEMTOTAL_KB, in_system

pytestmark = [pytest.mark.needs("--api-socket"), pytest.mark.xdist_group("api")]

MIB = 1 << 20
PAUSE = 60.0  # seconds
# What acpid or systemd-logind does: neither is in the system, whose devices nobody looks for at its start.
POWER_BUTTON = """
modprobe -a button evdev
cat >/root/button.py <<'END'
import glob, os, select, struct
event = struct.Struct("llHHi")
files = [open(path, "rb", buffering=0) for path in glob.glob("/dev/input/event*")]
open("/root/waits", "w")
while True:
    for file in select.select(files, [], [])[0]:
        _, _, kind, code, value = event.unpack(file.read(event.size))
        if (kind, code, value) == (1, 116, 1):  # EV_KEY, KEY_POWER, pressed
            os.execlp("systemctl", "systemctl", "poweroff", "--force")
END
setsid python3 /root/button.py >/root/button.log 2>&1 </dev/null &
until [ -e /root/waits ]; do sleep 0.2; done
"""
PAUSES = 1000
CLOCK_SLACK = 10.0  # seconds that a command by ssh may take in an emulated machine


class Led(System):
    """A pileus that does nothing yet but listen; ``body`` is the configuration of a guest reached by ssh."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.folder = folder
        self.networks = [network]
        self._sockets = Path(tempfile.mkdtemp(prefix="api-"))
        self._control = self._sockets / "control"
        self._master = None
        self.socket = self._sockets / "api"
        self.vsock = self._sockets / "vsock"
        disk = folder / "disk"
        with disk.open("wb") as file:
            file.truncate(64 * MIB)
        self.body = {
            "cpus": {"boot_vcpus": 4, "max_vcpus": 4},
            "memory": {"size": 512 * MIB},
            "payload": {
                "kernel": str(TRIXIE_PVH.path),
                "initramfs": str(TRIXIE_PVH.initramfs),
                "cmdline": f"root=/dev/vda rw panic=-1 {QUIET} {network.parameter}",
            },
            "disks": [{"path": str(copy_of_root(folder))}, {"path": str(disk), "serial": "data"}],
            "net": [{"ip": network.host, "mask": "255.255.255.0", "mac": network.mac}],
            "vsock": {"cid": 3, "socket": str(self.vsock)},
            "rng": {"src": "/dev/urandom"},
            "serial": {"mode": "Tty"},
            "console": {"mode": "Off"},
        }
        self.guest = Guest(["--api-socket", str(self.socket)], folder / "log")

    def call(self, verb: str, body: object = None, method: str = "PUT") -> object:
        command = ["curl", "-sS", "--fail-with-body", "--retry", "20", "--retry-connrefused", "--unix-socket",
                   str(self.socket), "-X", method, f"http://localhost/api/v1/{verb}"]  # fmt: skip
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{verb}: {done.stdout}{done.stderr}\n{self._story()}"
        return json.loads(done.stdout) if done.stdout else None

    def run_it(self) -> None:
        """Have the guest running, whatever tests came before."""
        with contextlib.suppress(AssertionError):
            if self.state() == "Running":
                return
            self.call("vm.delete")
        self.call("vm.create", self.body)
        self.call("vm.boot")
        self.connect().settle()

    def state(self) -> str:
        info = self.call("vm.info", method="GET")
        assert isinstance(info, dict)
        return str(info["state"])

    def cpu_ticks(self) -> int:
        """Return the clock ticks of CPU time that pileus, its vCPUs included, has used."""
        fields = Path(f"/proc/{self.guest.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


@pytest.fixture(scope="module")
def led(network: NewNetwork) -> Iterator[Led]:
    if reason := why_not():
        pytest.skip(reason)
    led = Led(network(), new_folder())
    while not led.socket.exists():
        assert led.guest.process.poll() is None
        time.sleep(0.1)
    yield led
    led.call("vmm.shutdown")
    assert led.guest.wait() == 0
    assert not led.socket.exists()
    led.close()


def test_api_create_boot(led: Led) -> None:
    led.call("vm.create", led.body)
    assert led.state() == "Created"
    led.call("vm.boot")
    assert led.state() == "Running"
    cpus, memory, entropy = in_system(led.connect().settle())
    assert cpus == 4
    assert memory > SMALL_MEMTOTAL_KB
    assert entropy >= ENTROPY


def test_api_pause_resume(led: Led) -> None:
    led.run_it()
    led.call("vm.pause")
    assert led.state() == "Paused"
    before, started = led.cpu_ticks(), time.monotonic()
    assert not led._banner()
    time.sleep(PAUSE - (time.monotonic() - started))
    assert led.cpu_ticks() - before <= PAUSE * os.sysconf("SC_CLK_TCK") / 1000  # the API's own
    led.call("vm.resume")
    assert led.state() == "Running"
    assert in_system(led)[0] == 4
    asked = time.time()
    assert abs(float(led.check("date +%s.%N")) - asked) < CLOCK_SLACK
    assert not led.run("dmesg | grep -iE 'soft lockup|stall|hung task'").stdout


@pytest.mark.long
def test_a_thousand_pauses_under_load_lose_nothing(led: Led) -> None:
    """Disk, network and vsock carry data that is verified, and are stopped and set going all the time."""
    led.run_it()
    done = threading.Event()
    failures: list[str] = []

    def disk() -> None:
        fio = (
            "fio --name=data --filename=/dev/disk/by-id/virtio-data --rw=randwrite --bs=4k --ioengine=libaio "
            "--direct=1 --iodepth=8 --size=48M --verify=crc32c --verify_fatal=1 --do_verify=1 --minimal"
        )
        while not done.is_set():
            result = led.run(fio, timeout=600)
            if result.returncode:
                failures.append(f"fio: {result.stdout}{result.stderr}")
                return

    def streams() -> None:
        data = os.urandom(4 * MIB)
        wanted = hashlib.sha256(data).hexdigest()
        count = 0
        while not done.is_set():
            for client in (_by_vsock(led), socket.create_connection((led.networks[0].guest, 1234), 120)):
                with client:
                    client.settimeout(300)
                    sender = threading.Thread(target=_send, args=(client, data))
                    sender.start()
                    echoed = _receive(client)
                    sender.join()
                count += 1
                if hashlib.sha256(echoed).hexdigest() != wanted:
                    failures.append(f"stream {count} came back with {len(echoed)} bytes")

    for address in ("TCP-LISTEN:1234", "VSOCK-LISTEN:1234"):
        led.check(f"setsid socat -t 300 {address},fork,reuseaddr EXEC:cat >/dev/null 2>&1 </dev/null &")
    led.check("modprobe vmw_vsock_virtio_transport; sleep 1")
    threads = [threading.Thread(target=disk), threading.Thread(target=streams)]
    for thread in threads:
        thread.start()
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(led.socket))
    try:
        for number in range(PAUSES):
            for verb in ("pause", "resume"):
                connection.request("PUT", f"/api/v1/vm.{verb}")
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (204, b""), f"{verb} {number}"
            time.sleep(0.02)  # so that the guest gets somewhere
    finally:
        done.set()
        for thread in threads:
            thread.join()
        connection.close()
    assert not failures
    assert not led.run("dmesg | grep -iE 'soft lockup|stall|hung task|i/o error'").stdout


def test_it_can_be_shut_down_and_booted_deleted_and_made_again(led: Led) -> None:
    led.run_it()
    led.disconnect()
    led.call("vm.shutdown")
    assert led.state() == "Shutdown"
    led.call("vm.boot")
    led.connect()
    assert in_system(led)[0] == 4
    led.disconnect()
    led.call("vm.delete")
    led.call("vm.create", {**led.body, "cpus": {"boot_vcpus": 1}})
    led.call("vm.boot")
    led.connect()
    assert in_system(led)[0] == 1
    led.check(POWER_BUTTON)
    led.call("vm.power-button")
    deadline = time.monotonic() + 200
    while led.state() != "Shutdown":
        assert time.monotonic() < deadline, led._story()
        time.sleep(1)
    led.disconnect()


def _by_vsock(led: Led) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(120)
    client.connect(str(led.vsock))
    client.sendall(b"CONNECT 1234\n")
    answer = b""
    while not answer.endswith(b"\n"):
        answer += client.recv(1)
    return client


def _send(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def _receive(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))

"""virtio-net between a guest and its host's TAPs: both ways, with and without offloads, several at once."""

import hashlib
import json
import os
import socket
import subprocess
import threading

import pytest

from tests.guest.machine import MIB, PAIRS, Machine

pytestmark = pytest.mark.needs("--disk", "--net", "--balloon")

SECONDS = 3
OFFLOADS = "rx {0} tx {0} sg {0} tso {0} gso {0} gro {0}"


def test_three_interfaces_and_the_loopback(machine: Machine) -> None:
    assert machine.check("ip -o link | wc -l") == "4"  # the reference's test 17
    names = {machine.interface(net) for net in machine.networks}
    assert len(names) == 3
    for net in machine.networks:
        machine.check(f"ping -c 2 -W 10 -I {net.guest} {net.host}")


def test_ping_goes_both_ways_at_every_size(machine: Machine) -> None:
    net = machine.last
    for size in (0, 56, 1472, 9000):
        machine.check(f"ping -c 2 -W 10 -s {size} {net.host}")
        ping = ["ping", "-c", "2", "-W", "10", "-s", str(size), net.guest]
        done = subprocess.run(ping, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("offloads", ["on", "off"])
def test_a_stream_arrives_unchanged_both_ways(machine: Machine, offloads: str) -> None:
    net = machine.last
    machine.check(f"ethtool -K {machine.interface(net)} {OFFLOADS.format(offloads)} >/dev/null 2>&1 || true")
    data = os.urandom(6 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    with _Peer(net.host, data) as peer:
        received = machine.check(f"socat -u TCP:{net.host}:{peer.port} - | tee /tmp/stream | sha256sum")
        assert received.split()[0] == digest
        machine.check(f"socat -u OPEN:/tmp/stream TCP:{net.host}:{peer.port}")
        peer.join()
    assert hashlib.sha256(peer.received).hexdigest() == digest


@pytest.mark.parametrize("offloads", ["on", "off"])
def test_iperf3_moves_data_both_ways(machine: Machine, offloads: str) -> None:
    net = machine.last
    machine.check(f"ethtool -K {machine.interface(net)} {OFFLOADS.format(offloads)} >/dev/null 2>&1 || true")
    for direction in ("", "--reverse"):
        assert _iperf3(machine, net.host, direction) > MIB // 4


def test_two_queue_pairs_carry_parallel_streams(machine: Machine) -> None:
    net = machine.pairs
    name = machine.interface(net)
    assert machine.check(f"ls -d /sys/class/net/{name}/queues/rx-* | wc -l") == str(PAIRS)
    for direction in ("", "--reverse"):
        assert _iperf3(machine, net.host, f"--parallel 4 {direction}") > MIB // 4
    machine.check(f"ethtool -L {name} combined 1; ping -c 2 -W 10 {net.host}; ethtool -L {name} combined 2")
    machine.check(f"ping -c 2 -W 10 {net.host}")


def test_an_interface_can_go_down_and_up_and_change_its_address(machine: Machine) -> None:
    net = machine.last
    name = machine.interface(net)
    machine.check(
        f"""
        ip link set {name} down
        ip link set {name} address 02:00:00:00:00:01
        ip link set {name} up
        ping -c 2 -W 10 {net.host}
        ip link set {name} down
        ip link set {name} address {net.mac}
        ip link set {name} promisc on
        ip link set {name} up promisc off
        ping -c 2 -W 10 {net.host}
        """
    )


def _iperf3(machine: Machine, host: str, options: str) -> int:
    """Return the bytes that arrived in a run of a few seconds with the host as server."""
    command = f"iperf3 --client {host} --time {SECONDS} --json {options} >/tmp/iperf"
    with subprocess.Popen(
        ["iperf3", "--server", "--one-off", "--bind", host],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            # Several tries: it does not say when it listens.
            report = machine.check(
                f"for try in 1 2 3 4 5; do {command} && break; sleep 1; done; cat /tmp/iperf"
            )
        finally:
            server.kill()
    return int(json.loads(report)["end"]["sum_received"]["bytes"])


class _Peer:
    """Sends ``data`` to the first that connects and collects what the second sends."""

    def __init__(self, host: str, data: bytes) -> None:
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(240)
        self.port = self._listener.getsockname()[1]
        self._data = data
        self.received = bytearray()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "_Peer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def join(self) -> None:
        self._thread.join(240)

    def _serve(self) -> None:
        with self._listener.accept()[0] as connection:
            connection.sendall(self._data)
        with self._listener.accept()[0] as connection:
            while data := connection.recv(65536):
                self.received += data

"""pileus-net under a front-end that nobody here wrote: DPDK's virtio-user."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.listening import PATIENCE
from tests.peer.vhost_user import LIBRARIES, PROGRAMS, missing
from tests.unit.net.namespace import Namespace, packet_socket
from tests.unit.vhost_user.commands import Process

MAC, ELSEWHERE = bytes.fromhex("2e0000000001"), bytes.fromhex("020000000099")
ETHERTYPE = b"\x88\xb5"  # for experiments


@pytest.mark.skipif(missing("dpdk-testpmd"), reason="no dpdk-testpmd: run scripts/setup test")
@pytest.mark.parametrize("length", [60, 1514])
def test_testpmd_sends_back_what_came_in_by_the_tap(tmp_path: Path, length: int) -> None:
    """It drops what comes before it looked at its link, once a second or so."""

    with (
        Namespace(),
        Process("pileus-net", ["--backend", "tap=dpdk0"], tmp_path / "net") as backend,
        packet_socket("dpdk0") as sock,
    ):
        words = [
            str(PROGRAMS / "dpdk-testpmd"),
            "--lcores",
            "0@0,1@0",
            "--main-lcore",
            "0",
            "--no-huge",
            "-m",
            "256",
        ]
        words += ["--no-pci", "--no-telemetry", "--iova-mode=va", f"--file-prefix=net{os.getpid()}"]
        for plugin in ("net_virtio", "mempool_ring"):
            words += ["-d", str(LIBRARIES / f"librte_{plugin}.so.25")]
        words += [f"--vdev=net_virtio_user0,path={backend.socket},queues=1,mac={MAC.hex(':')}", "--"]
        words += ["--forward-mode=io", "--auto-start", "--total-num-mbufs=4096", "--stats-period=1000"]
        testpmd = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            sock.settimeout(0.2)
            frame = (MAC + ELSEWHERE + ETHERTYPE).ljust(length, b"x")
            deadline = time.monotonic() + PATIENCE
            while _came_back(sock, frame) is None:
                assert time.monotonic() < deadline, "nothing came back"
                assert testpmd.poll() is None
                sock.send(frame)
        finally:
            testpmd.kill()
            testpmd.communicate()
        assert backend.end() == 0


def _came_back(sock: socket.socket, frame: bytes) -> bytes | None:
    """A frame that the host was given: what it sent itself is seen as well, as outgoing."""
    try:
        while True:
            data, address = sock.recvfrom(2048)
            if data == frame and address[2] != socket.PACKET_OUTGOING:
                return data
    except TimeoutError:
        return None

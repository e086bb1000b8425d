"""The front-end of interfaces against passt of Debian 13."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.testing import FakeDriver
from pileus.vhost_user.connection import Client
from pileus.vhost_user.devices.net import VhostUserNet
from tests.peer.vhost_user import PROGRAMS, Backend, driving, missing

pytestmark = pytest.mark.skipif(missing("passt"), reason="no passt: run scripts/setup test")

RX, TX = 0, 1
GUEST_MAC = bytes.fromhex("2e0000000001")
GUEST, GATEWAY = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])
HEADER_SIZE = 12  # virtio_net_hdr
ARP = 0x0806


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeDriver]:
    socket = tmp_path / "socket"
    words = [
        str(PROGRAMS / "passt"),
        "--vhost-user",
        "-f",
        "-q",
        "-s",
        str(socket),
        "-a",
        "10.0.2.15",
        "-n",
        "24",
    ]
    words += ["-g", "10.0.2.2"] + (["--runas", "0"] if os.geteuid() == 0 else [])
    with Backend(words, socket):
        client = Client(str(socket))
        with driving(lambda loop: VhostUserNet("net0", "--net", client, loop, mac=GUEST_MAC)) as driver:
            yield driver


def arp_request() -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + GUEST + bytes(6) + GATEWAY
    return b"\xff" * 6 + GUEST_MAC + struct.pack("!H", ARP) + body


def test_passt_answers_for_the_gateway(driver: FakeDriver) -> None:
    for _ in range(3):
        heads = [driver.add(writable=[HEADER_SIZE + 2048], queue=RX) for _ in range(16)]
        driver.kick(RX)
        driver.add([bytes(HEADER_SIZE) + arp_request()], queue=TX)
        driver.kick(TX)
        driver.wait(TX)
        for used in driver.wait(RX):
            assert used.head in heads
            frame = driver.read(used.head, RX)[HEADER_SIZE : used.length]
            if frame[12:14] == struct.pack("!H", ARP):
                break
        assert frame[:6] == GUEST_MAC
        assert frame[28:32] == GATEWAY
        driver.start()

"""The front-end of interfaces against passt and dpdk-testpmd of Debian 13."""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.testing import FakeDriver
from pileus.vhost_user.connection import Client
from pileus.vhost_user.devices.net import VhostUserNet
from tests.listening import PATIENCE
from tests.peer.vhost_user import LIBRARIES, PROGRAMS, Backend, driving, missing

needs_passt = pytest.mark.skipif(missing("passt"), reason="no passt: run scripts/setup test")
needs_testpmd = pytest.mark.skipif(missing("dpdk-testpmd"), reason="no dpdk-testpmd: run scripts/setup test")

RX, TX, CONTROL = 0, 1, 4
GUEST_MAC = bytes.fromhex("2e0000000001")
GUEST, GATEWAY = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])
HEADER_SIZE = 12  # virtio_net_hdr
ARP = 0x0806


@pytest.fixture
def passt(tmp_path: Path) -> Iterator[FakeDriver]:
    """The driver of an interface that passt has."""
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


@needs_passt
def test_passt_answers_for_the_gateway(passt: FakeDriver) -> None:
    driver = passt
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


@pytest.fixture
def testpmd(tmp_path: Path) -> Iterator[FakeDriver]:
    """The driver of an interface with two pairs, each of which gives back what it is sent."""
    socket = tmp_path / "socket"
    options = "--lcores 0@0,1@0 --main-lcore 0 --no-huge -m 256 --no-pci --no-telemetry --iova-mode=va"
    words = [str(PROGRAMS / "dpdk-testpmd"), *options.split(), f"--file-prefix=pileus{os.getpid()}"]
    for plugin in ("net_vhost", "mempool_ring"):
        words += ["-d", str(LIBRARIES / f"librte_{plugin}.so.25")]
    words += [f"--vdev=net_vhost0,iface={socket},queues=2", "--"]
    words += ["--forward-mode=io", "--auto-start", "--rxq=2", "--txq=2", "--total-num-mbufs=4096"]
    with Backend([*words, "--stats-period=1000"], socket):
        client = Client(str(socket))
        with driving(
            lambda loop: VhostUserNet("net0", "--net", client, loop, mac=GUEST_MAC, num_queues=4)
        ) as driver:
            yield driver


def set_pairs(driver: FakeDriver, count: int) -> bytes:
    head = driver.add([bytes([4, 0]), count.to_bytes(2, "little")], [1], queue=CONTROL)
    driver.kick(CONTROL)
    driver.wait(CONTROL)
    return driver.read(head, CONTROL)


@needs_testpmd
def test_each_pair_of_testpmd_forwards_by_itself(testpmd: FakeDriver) -> None:
    """It drops what comes before it looked at its link, once a second or so."""
    driver = testpmd
    assert set_pairs(driver, 2) == b"\0"
    for pair in (0, 1):
        rx, tx = 2 * pair, 2 * pair + 1
        frame = b"\xff" * 6 + GUEST_MAC + b"\x88\xb5" + bytes([pair]) * 100
        head = driver.add(writable=[2048], queue=rx)
        driver.kick(rx)
        deadline = time.monotonic() + PATIENCE
        while not (used := driver.used(rx)):
            assert time.monotonic() < deadline
            driver.add([bytes(HEADER_SIZE) + frame], queue=tx)
            driver.kick(tx)
            driver.wait(tx)
            time.sleep(0.1)
        assert used[0].head == head
        assert driver.read(head, rx)[HEADER_SIZE : used[0].length] == frame

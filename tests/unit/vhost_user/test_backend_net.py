"""A TAP served over vhost-user, by our own front-end."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.config.backends import NetBackendConfig
from pileus.testing import FakeDriver
from pileus.vhost_user.backends.net import FRONT_ENDS, open_interface
from pileus.vhost_user.connection import Client
from pileus.vhost_user.devices.net import MQ, VhostUserNet
from tests.unit.net.namespace import Namespace

from .serving import Serving
from .test_backend import driving

MAC = bytes.fromhex("2e0000000001")
RX, TX, CONTROL = 0, 1, 4
HEADER_SIZE = 12
FRAME = b"\xff" * 6 + MAC + b"\x88\xb5" + bytes(range(100))


@pytest.fixture
def interface(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The back-end's socket, and one on the host's side of its TAP; two pairs."""
    with Namespace():
        device = open_interface(NetBackendConfig(num_queues=4))
        host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
        host.bind((device.tap.name, 0x88B5))
        host.settimeout(10)
        with Serving(device, tmp_path / "socket"), host:
            yield str(tmp_path / "socket"), host


def drive(path: str, pairs: int):  # type: ignore[no-untyped-def]
    return driving(
        lambda loop: VhostUserNet("net0", "--net", Client(path), loop, mac=MAC, num_queues=2 * pairs)
    )


def set_pairs(driver: FakeDriver, count: int) -> bytes:
    head = driver.add([bytes([4, 0]), count.to_bytes(2, "little")], [1], queue=CONTROL)
    driver.kick(CONTROL)
    driver.wait(CONTROL)
    return driver.read(head, CONTROL)


def send(driver: FakeDriver, host: socket.socket, frame: bytes, queue: int = TX) -> bytes:
    driver.add([bytes(HEADER_SIZE) + frame], queue=queue)
    driver.kick(queue)
    driver.wait(queue)
    return host.recv(2048)


def receive(driver: FakeDriver, host: socket.socket, frame: bytes) -> bytes:
    """A frame from the host; what else comes in is passed over."""
    heads = [driver.add(writable=[2048], queue=RX) for _ in range(8)]
    driver.kick(RX)
    host.send(frame)
    while True:
        for used in driver.wait(RX):
            data = driver.read(used.head, RX)[HEADER_SIZE : used.length]
            assert used.head in heads
            if data[12:14] == frame[12:14]:
                return data


@pytest.mark.parametrize("pairs", [1, 2])
def test_frames_go_both_ways(interface: tuple[str, socket.socket], pairs: int) -> None:
    path, host = interface
    with drive(path, pairs) as driver:
        for count in range(20):
            frame = FRAME + bytes([count])
            assert send(driver, host, frame) == frame
        assert receive(driver, host, FRAME) == FRAME


def test_pairs_serve_once_their_rings_are_enabled(interface: tuple[str, socket.socket]) -> None:
    path, host = interface
    with drive(path, 2) as driver:
        assert driver.offered & MQ
        for count in (2, 1, 2):
            assert set_pairs(driver, count) == b"\0"
            for pair in range(count):
                assert send(driver, host, FRAME, 2 * pair + 1) == FRAME


def test_front_ends_come_and_go(interface: tuple[str, socket.socket]) -> None:
    path, host = interface
    for _ in range(3):
        with drive(path, 1) as driver:
            assert send(driver, host, FRAME) == FRAME
            driver.start()
            assert receive(driver, host, FRAME) == FRAME


def test_what_is_the_front_end_s_is_not_offered_but_for_its_name() -> None:
    with Namespace():
        device = open_interface(NetBackendConfig())
        assert device.offered & FRONT_ENDS == 0
        assert device.queue_groups == 1
        assert len(device.queues) == 2
        device.close()

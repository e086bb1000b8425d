"""Devices whose queues another process serves, driven to their back-ends' end and beyond."""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.errors import ConfigError, HostError
from pileus.testing import FakeDriver
from pileus.vhost_user import connection, protocol
from pileus.vhost_user.connection import Client, Server
from pileus.vhost_user.devices.blk import CONFIG_WCE, VhostUserBlk
from pileus.vhost_user.devices.device import VhostUserDevice
from pileus.vhost_user.devices.fs import VhostUserFs
from pileus.vhost_user.devices.net import CTRL_VQ, MAC, MQ, MRG_RXBUF, VhostUserNet
from pileus.vhost_user.frontend import RUNNING
from pileus.vhost_user.protocol import NEED_REPLY, VERSION, BackendRequest, Feature, Message, Request
from pileus.virtio import status
from pileus.virtio.device import VERSION_1
from pileus.virtio.queue import RING_FEATURES
from pileus.vmm.loop import Loop

from .fake_backend import ALL, PATIENCE, FakeBackend

BASIC = VERSION_1 | RING_FEATURES | protocol.PROTOCOL_FEATURES
MAC_ADDRESS = bytes.fromhex("2e0102030405")
CAPACITY = struct.Struct("<Q")


class Room:
    """A folder for sockets, a control loop on a thread, and all that was made in it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "socket")
        self.loop = Loop()
        self.drivers: list[FakeDriver] = []
        self.backends: list[FakeBackend] = []
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def backend(self, **about: Any) -> FakeBackend:
        """The next back-end, once the one before it is gone."""
        for each in self.backends:
            each.close()
        self.backends.append(FakeBackend(self.path, **about))
        return self.backends[-1]

    def drive(self, make: Callable[..., VhostUserDevice], **about: Any) -> FakeDriver:
        """A device of our back-end, and its driver at DRIVER_OK."""
        device = make("dev0", "--option", Client(self.path), self.loop, **about)
        driver = FakeDriver(device, shared=True)
        self.drivers.append(driver)
        return driver

    def close(self) -> None:
        self.loop.post(self.loop.stop)
        self._thread.join(PATIENCE)
        for driver in self.drivers:
            driver.close()
        for backend in self.backends:
            backend.close()
        self.loop.close()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    room.close()


def device_of(driver: FakeDriver) -> VhostUserDevice:
    assert isinstance(driver.device, VhostUserDevice)
    return driver.device


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def running(driver: FakeDriver) -> Callable[[], bool]:
    device = device_of(driver)
    return lambda: device._frontend is not None and device._frontend.state == RUNNING


# -- what the driver sees -------------------------------------------------------------------------


def test_a_disk_offers_what_its_back_end_has_and_we_know(room: Room) -> None:
    config = bytearray(60)
    CAPACITY.pack_into(config, 0, 1234)
    struct.pack_into("<I", config, 12, 254)
    room.backend(features=BASIC | 1 << 9 | 1 << 16 | 1 << 34, config=bytes(config))
    driver = room.drive(VhostUserBlk, num_queues=3, queue_size=64)
    assert driver.offered == VERSION_1 | RING_FEATURES | 1 << 9
    assert CAPACITY.unpack(driver.read_config(0, 8)) == (1234,)
    assert struct.unpack("<I", driver.read_config(12, 4)) == (62,)
    assert struct.unpack("<H", driver.read_config(34, 2)) == (3,)


def test_a_directory_has_its_tag_and_an_urgent_queue(room: Room) -> None:
    backend = room.backend(protocol_features=Feature.MQ | Feature.REPLY_ACK)
    driver = room.drive(VhostUserFs, tag="shared", num_queues=2)
    assert driver.read_config() == b"shared".ljust(36, b"\0") + b"\x02\0\0\0"
    assert [vring.size for vring in backend.vrings[:3]] == [1024] * 3


def test_an_interface_has_the_mac_address_it_was_given(room: Room) -> None:
    room.backend(features=BASIC | MRG_RXBUF)
    driver = room.drive(VhostUserNet, mac=MAC_ADDRESS)
    assert driver.offered & (MAC | MRG_RXBUF | MQ | CTRL_VQ) == MAC | MRG_RXBUF
    assert driver.read_config(0, 6) == MAC_ADDRESS
    assert not room.backends[0].virtio_features & MAC


def test_the_guest_gets_no_kick_of_ours(room: Room) -> None:
    room.backend()
    assert room.drive(VhostUserBlk, num_queues=2).device.python_queues == ()


def test_chains_are_served_by_the_back_end(room: Room) -> None:
    room.backend(fill=b"\xa5")
    driver = room.drive(VhostUserBlk)
    driver.reset()
    driver.negotiate()
    driver.set_up_queues()
    head = driver.add(writable=[100])
    driver.control.set_status(driver.status | status.DRIVER_OK)
    driver.wait()
    assert driver.read(head) == b"\xa5" * 100
    assert driver.interrupts == 1


def test_a_reset_takes_the_rings_back(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk, num_queues=2)
    driver.reset()
    assert backend.names()[-5:] == ["SET_VRING_ENABLE"] * 2 + ["GET_VRING_BASE"] * 2 + ["RESET_DEVICE"]
    driver.start()
    assert [vring.enabled for vring in backend.vrings[:3]] == [True, True, False]


def test_another_interrupt_is_told_while_it_runs(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    fd = os.eventfd(0)
    driver.device.queues[0].call_fd = fd
    driver.device.call_changed(0)
    os.eventfd_write(backend.vrings[0].call, 1)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_the_write_cache_is_the_driver_s_to_turn_off(room: Room) -> None:
    backend = room.backend(features=BASIC | CONFIG_WCE, config=bytes(32) + b"\x01" + bytes(27))
    driver = room.drive(VhostUserBlk)
    for offset, data in ((0, b"\0"), (32, b"\x02"), (31, b"\0\0"), (32, b"\0")):
        driver.write_config(offset, data)
    assert backend.names().count("SET_CONFIG") == 1
    assert backend.config[32] == driver.read_config(32, 1)[0] == 0


def test_a_write_cache_that_was_not_negotiated_stays(room: Room) -> None:
    backend = room.backend(features=BASIC | CONFIG_WCE)
    driver = room.drive(VhostUserBlk, wce=False)
    driver.write_config(32, b"\x01")
    assert "SET_CONFIG" not in backend.names()


def test_a_saved_state_says_where_the_rings_stand(room: Room) -> None:
    room.backend(fill=b"\x01")
    driver = room.drive(VhostUserBlk)
    for _ in range(3):
        driver.add(writable=[1])
    assert driver.control.state()["queues"][0]["next_avail"] == 0
    assert driver.control.state()["queues"][0]["next_avail"] == 3
    assert running(driver)()


# -- pairs of an interface ------------------------------------------------------------------------


def set_pairs(driver: FakeDriver, queue: int, count: int) -> bytes:
    head = driver.add([bytes([4, 0]), count.to_bytes(2, "little")], [1], queue=queue)
    driver.kick(queue)
    driver.wait(queue)
    return driver.read(head, queue)


def test_pairs_are_served_once_the_driver_asks_for_them(room: Room) -> None:
    backend = room.backend(fill=b"")
    driver = room.drive(VhostUserNet, mac=MAC_ADDRESS, num_queues=6)
    assert driver.offered & (MQ | CTRL_VQ) == MQ | CTRL_VQ
    assert [vring.enabled for vring in backend.vrings] == [True] * 2 + [False] * 6
    for count, answer in ((3, 0), (0, 1), (4, 1), (2, 0)):
        assert set_pairs(driver, 6, count)[0] == answer
    assert [vring.enabled for vring in backend.vrings] == [True] * 4 + [False] * 4
    assert backend.vrings[6].size == 0


def test_pairs_are_remembered_for_the_next_back_end(room: Room) -> None:
    room.backend()
    driver = room.drive(VhostUserNet, mac=MAC_ADDRESS, num_queues=4)
    assert set_pairs(driver, 4, 2) == b"\0"
    room.backends[0].close()
    assert set_pairs(driver, 4, 2) == b"\0"
    backend = room.backend()
    backend.wait_for(lambda: all(vring.enabled for vring in backend.vrings[:4]))


def test_who_asked_hears_of_a_back_end_that_goes_and_comes(room: Room) -> None:
    room.backend()
    driver = room.drive(VhostUserBlk)
    heard: list[str] = []
    driver.device.noticed = heard.append
    room.backends[0].close()
    until(lambda: heard == ["backend-lost"])
    room.backend()
    until(lambda: heard == ["backend-lost", "backend-back"])


def test_without_mq_the_control_queue_comes_third(room: Room) -> None:
    backend = room.backend()
    device = VhostUserNet("net0", "--net", Client(room.path), room.loop, mac=MAC_ADDRESS, num_queues=4)
    driver = FakeDriver(device, features=CTRL_VQ | MAC, queue_sizes=[64, 64, 64, 0, 0], shared=True)
    room.drivers.append(driver)
    assert [vring.size for vring in backend.vrings[:4]] == [64, 64, 0, 0]
    assert set_pairs(driver, 2, 2) == b"\x01"
    driver.reset()
    driver.start()
    assert set_pairs(driver, 2, 1) == b"\x01"


# -- back-ends that come and go -------------------------------------------------------------------


def test_a_back_end_that_comes_back_goes_on_where_the_other_stopped(room: Room) -> None:
    first = room.backend(fill=b"\x01")
    driver = room.drive(VhostUserBlk)
    driver.reset()
    driver.negotiate()
    driver.set_up_queues()
    driver.add(writable=[1])
    driver.control.set_status(driver.status | status.DRIVER_OK)
    driver.wait()
    inflight = first.inflight
    first.close()
    head = driver.add(writable=[2])
    driver.kick()
    second = room.backend(fill=b"\x02")
    driver.wait()
    assert driver.read(head) == b"\x02\x02"
    assert second.vrings[0].base == 1
    assert second.inflight == inflight is not None
    until(lambda: os.eventfd_read(second.vrings[0].kick))
    assert driver.status & status.NEEDS_RESET == 0


def test_after_a_driver_s_reset_nothing_is_in_flight(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    before = backend.inflight
    driver.start()
    assert backend.inflight != before


def test_a_driver_may_come_while_there_is_no_back_end(room: Room) -> None:
    room.backend(fill=b"\x01")
    driver = room.drive(VhostUserBlk)
    room.backends[0].close()
    until(lambda: device_of(driver)._frontend is None)
    driver.start()
    head = driver.add(writable=[3])
    room.backend(fill=b"\x02")
    driver.wait()
    assert driver.read(head) == b"\x02" * 3


def test_a_back_end_may_drop_a_conversation_any_number_of_times(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    for count in range(2, 6):
        backend.drop()
        backend.wait_for(lambda: backend.names().count("SET_OWNER") == count)  # noqa: B023
        backend.wait_for(lambda: backend.vrings[0].enabled)
    until(running(driver))


def test_a_back_end_that_lost_a_feature_stops_the_device(room: Room) -> None:
    room.backend(features=BASIC | 1 << 9)
    driver = room.drive(VhostUserBlk)
    room.backend(features=BASIC)
    until(lambda: driver.status & status.NEEDS_RESET)
    driver.start()
    assert not driver.offered & 1 << 9
    assert running(driver)()


def test_one_that_fails_to_start_is_tried_again(room: Room) -> None:
    refusals = [1, 1, 0]
    backend = room.backend(
        answers={Request.SET_FEATURES: lambda asked: Message(asked.request, refusals.pop(0))}
    )
    driver = room.drive(VhostUserBlk)
    backend.wait_for(lambda: not refusals)
    until(running(driver))
    assert not driver.status & status.NEEDS_RESET


def test_one_that_hangs_costs_its_driver_a_pause(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    monkeypatch.setattr(connection.Connection.allow, "__defaults__", (0.05,))
    backend.answers[Request.GET_VRING_BASE] = lambda _: None
    started = time.monotonic()
    driver.reset()
    assert time.monotonic() - started < PATIENCE / 2
    assert driver.status == 0
    del backend.answers[Request.GET_VRING_BASE]
    driver.start()
    until(running(driver))


def test_the_loop_turns_while_a_new_back_end_says_nothing(room: Room) -> None:
    room.backend()
    driver = room.drive(VhostUserBlk)
    silent = room.backend(answers={Request.GET_FEATURES: lambda _: None})
    silent.wait_for(lambda: silent.names()[-1:] == ["GET_FEATURES"])
    turned = threading.Event()
    room.loop.post(turned.set)
    assert turned.wait(PATIENCE / 5)
    closed = threading.Event()
    room.loop.post(driver.close)
    room.loop.post(closed.set)
    assert closed.wait(PATIENCE / 5)


def test_a_server_takes_one_back_end_after_the_other(room: Room, tmp_path: Path) -> None:
    """The other way round: here the device listens."""
    path = str(tmp_path / "server")
    server = Server(path)
    backend = room.backend(serve=False)

    def connect() -> threading.Thread:
        sock = Client(path).attempt()
        assert sock is not None
        thread = threading.Thread(target=backend.converse, args=(sock,))
        thread.start()
        return thread

    thread = connect()
    driver = FakeDriver(VhostUserBlk("blk0", "--disk", server, room.loop), shared=True)
    room.drivers.append(driver)
    for count in range(2, 4):
        backend.drop()
        thread.join(PATIENCE)
        until(lambda: device_of(driver)._frontend is None)
        thread = connect()
        backend.wait_for(lambda: backend.names().count("SET_OWNER") == count)  # noqa: B023
        until(running(driver))
    backend.drop()
    thread.join(PATIENCE)


def test_a_back_end_that_comes_and_leaves_is_refused(room: Room, tmp_path: Path) -> None:
    path = str(tmp_path / "server")
    server = Server(path)
    client = threading.Thread(target=lambda: _serve_at(path))
    client.start()
    with pytest.raises(HostError, match=r"cannot .* the back-end"):
        VhostUserBlk("blk0", "--disk", server, room.loop)
    client.join(PATIENCE)
    assert not os.path.exists(path)


def _serve_at(path: str) -> None:
    until(lambda: os.path.exists(path))
    sock = Client(path).attempt()
    assert sock is not None
    sock.settimeout(PATIENCE)
    sock.recv(1)
    sock.close()


# -- at the start ---------------------------------------------------------------------------------

UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "an older virtio": ({"features": protocol.PROTOCOL_FEATURES}, "VERSION_1"),
    "no configuration": ({"protocol_features": ALL & ~Feature.CONFIG}, "CONFIG"),
    "too few queues": ({"queues": 2}, "at most 2 queues"),
}


@pytest.mark.parametrize(("about", "told"), UNFIT.values(), ids=list(UNFIT))
def test_an_unfit_back_end_is_refused(room: Room, about: dict[str, Any], told: str) -> None:
    room.backend(**about)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=told):
        room.drive(VhostUserBlk, num_queues=4)
    room.backends[0].close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_no_back_end_at_all_is_one_sentence(room: Room) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=f"--option {room.path}: no back-end is there"):
        room.drive(VhostUserBlk, patience=0.02)
    assert os.listdir("/proc/self/fd") == before


# -- what a back-end asks -------------------------------------------------------------------------


def test_a_changed_configuration_reaches_the_driver(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    backend.config = CAPACITY.pack(99) + bytes(52)
    backend.ask(BackendRequest.CONFIG_CHANGE_MSG, flags=VERSION | NEED_REPLY)
    until(lambda: driver.config_interrupts == 1)
    assert CAPACITY.unpack(driver.read_config(0, 8)) == (99,)
    assert backend.requests is not None
    assert backend.requests.receive()[0].values == (0,)


def test_what_we_do_not_do_is_refused(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    backend.ask(BackendRequest.VRING_ERR, 0, 0, flags=VERSION | NEED_REPLY)
    assert backend.requests is not None
    assert backend.requests.receive()[0].values == (1,)
    assert running(driver)()


def test_nonsense_ends_the_conversation_and_another_begins(room: Room) -> None:
    backend = room.backend()
    driver = room.drive(VhostUserBlk)
    assert backend.requests is not None
    backend.requests._socket.sendall(bytes(12))
    backend.wait_for(lambda: backend.names().count("SET_OWNER") == 2)
    until(running(driver))
    assert not driver.status & status.NEEDS_RESET


# -- leaving --------------------------------------------------------------------------------------


def test_nothing_is_left_after_close(room: Room) -> None:
    backend = room.backend()
    room.loop.post(room.loop.stop)
    room.drive(VhostUserNet, mac=MAC_ADDRESS, num_queues=4).close()
    backend.close()
    before = set(os.listdir("/proc/self/fd"))
    backend = room.backend()
    room.drive(VhostUserNet, mac=MAC_ADDRESS, num_queues=4).close()
    backend.close()
    assert set(os.listdir("/proc/self/fd")) == before

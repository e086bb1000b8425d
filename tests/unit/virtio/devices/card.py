"""A guest's network card: a driver in memory on one side, the host's interface on the other."""

import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pileus.config.model import NetConfig
from pileus.memory._iommu import Endpoint
from pileus.testing import FakeDriver, Used
from pileus.virtio.devices.net import Net, open_net
from tests.unit.net.namespace import packet_socket

HEADER = struct.Struct("<BBHHHHH")
GUEST_MAC = bytes.fromhex("2e0000000001")
HOST_MAC = bytes.fromhex("020000000001")
TEST_TYPE = b"\x88\xb5"  # IEEE 802 local experimental Ethertype 1
PATIENCE = 10.0


class Packet(NamedTuple):
    """What a driver sends and receives: the header's fields but ``num_buffers``, and the frame."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int
    frame: bytes


def header(
    flags: int = 0,
    gso_type: int = 0,
    hdr_len: int = 0,
    gso_size: int = 0,
    csum_start: int = 0,
    csum_offset: int = 0,
    num_buffers: int = 0,
) -> bytes:
    return HEADER.pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers)


def frame(payload: bytes = b"", *, to: bytes = GUEST_MAC, source: bytes = HOST_MAC) -> bytes:
    """An Ethernet frame of a type that no host answers."""
    return to + source + TEST_TYPE + payload.ljust(46, b".")


class Card:
    """``net`` under a driver that takes ``features``; a packet socket is the host's side."""

    def __init__(
        self,
        *,
        features: int | None = None,
        event_idx: bool = True,
        start: bool = True,
        iommu_endpoint: Endpoint | None = None,
        **config: Any,
    ) -> None:
        self.net: Net = open_net(
            NetConfig(**{"mac": GUEST_MAC.hex(":"), "host_mac": HOST_MAC.hex(":"), **config}), 0
        )
        self.net.iommu = iommu_endpoint
        self.hold(PATIENCE)  # a busy machine shall not make packets drop
        ranges = [(0, 64 << 20), (1 << 32, 1 << 20)]
        self.driver = FakeDriver(self.net, features=features, event_idx=event_idx, ranges=ranges, start=start)
        self.host = packet_socket(self.net.tap.name)
        self.came: dict[int, list[Used]] = {}  # chains that came back and were not looked at, by pair

    def hold(self, seconds: float) -> None:
        """How long a packet waits for chains."""
        for pair in self.net.pairs:
            pair.hold_ms = int(seconds * 1000)

    def close(self) -> None:
        self.host.close()
        self.driver.close()

    # -- the guest's side -------------------------------------------------------------------------

    def offer(self, *buffers: int, pair: int = 0, count: int = 1, indirect: bool = False) -> None:
        """Give the device ``count`` chains of these buffers to receive into."""
        for _ in range(count):
            self.driver.add(writable=buffers, queue=2 * pair, indirect=indirect)
        self.driver.kick_if_wanted(2 * pair)

    def receive(self, pair: int = 0) -> Packet:
        """The next packet, put together out of as many chains as its header says."""
        used = self._used(pair)
        first = self.driver.read(used.head, 2 * pair)[: used.length]
        parts = [first]
        buffers = HEADER.unpack_from(first)[-1]
        for _ in range(buffers - 1):
            used = self._used(pair)
            parts.append(self.driver.read(used.head, 2 * pair)[: used.length])
        flags, kind, hdr_len, gso_size, start, offset, _ = HEADER.unpack_from(first)
        return Packet(flags, kind, hdr_len, gso_size, start, offset, b"".join(parts)[HEADER.size :])

    def _used(self, pair: int) -> Used:
        """The next chain that came back."""
        came = self.came.setdefault(pair, [])
        if not came:
            came += self.driver.wait(2 * pair)
        return came.pop(0)

    def send(self, *parts: bytes, pair: int = 0, indirect: bool = False) -> None:
        """Send a packet with its header, in these buffers."""
        self.driver.add(readable=parts, queue=2 * pair + 1, indirect=indirect)
        self.driver.kick_if_wanted(2 * pair + 1)
        self.driver.wait(2 * pair + 1)

    def command(self, group: int, command: int, data: bytes = b"", index: int | None = None) -> int:
        """The answer to a control command."""
        queue = len(self.net.queues) - 1 if index is None else index
        head = self.driver.add(
            [bytes([group, command]), data] if data else [bytes([group, command])], [1], queue
        )
        self.driver.kick(queue)
        assert [used.length for used in self.driver.wait(queue)] == [1]
        return self.driver.read(head, queue)[0]

    def counter(self, name: str) -> int:
        return self.net.counters()[name]

    # -- the host's side --------------------------------------------------------------------------

    def next_on_host(self) -> bytes:
        """The next frame of ours that came out of the guest."""
        while True:
            data, about = self.host.recvfrom(70000)
            if about[2] != 4 and data[12:14] == TEST_TYPE:  # PACKET_OUTGOING is what we sent ourselves
                return data


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)

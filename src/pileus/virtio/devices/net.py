"""virtio-net over a TAP: this module negotiates and obeys the control queue, ``_net`` moves the packets.

Queues are rx and tx of pair 0, rx and tx of pair 1, and so on, then the control queue. One engine, a thread,
serves a pair; pairs but the first rest until the driver asks for them.

Source: virtio 1.2, 5.1 (Network Device)
"""

import os
import struct

from pileus import log
from pileus.errors import GuestError, HostError
from pileus.net import mac as mac_address
from pileus.net import tap as taps
from pileus.net.interface import Interface
from pileus.net.tap import Tap
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice
from pileus.virtio.devices._net import Pair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pileus.config.model import NetConfig
    from pileus.virtio.device import State
    from pileus.virtio.queue import Chain

DEFAULT_IP, DEFAULT_MASK = "192.168.249.1", "255.255.255.0"  # of the host, on a TAP that is made here
USUAL_MTU = 1500
CONTROL_QUEUE_SIZE = 64
COMMAND_BATCH = 16  # commands in a row
MAX_COMMAND = 64 << 10  # bytes of a control command: a table of MAC addresses is the longest
MAX_ADDRESSES = 1024  # of a table; more are as good as promiscuous

CSUM, GUEST_CSUM, CTRL_GUEST_OFFLOADS, MTU, MAC = (1 << bit for bit in (0, 1, 2, 3, 5))
GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO = (1 << bit for bit in (7, 8, 9, 10))
HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO = (1 << bit for bit in (11, 12, 13, 14))
MRG_RXBUF, STATUS, CTRL_VQ, CTRL_RX = (1 << bit for bit in (15, 16, 17, 18))
CTRL_RX_EXTRA, MQ, CTRL_MAC_ADDR = (1 << bit for bit in (20, 22, 23))
GUEST_USO4, GUEST_USO6, HOST_USO = (1 << bit for bit in (54, 55, 56))

ALWAYS = MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS
CHECKSUMS = CSUM | GUEST_CSUM
TSO = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN
UDP = GUEST_UFO | HOST_UFO
USO = GUEST_USO4 | GUEST_USO6 | HOST_USO

GSO_TYPES = {HOST_TSO4: 1, HOST_UFO: 3, HOST_TSO6: 4, HOST_USO: 5}  # feature -> gso_type, 5.1.6
OFFLOADS = {  # feature, also a bit of GUEST_OFFLOADS_SET -> what the TAP is told, and the features it needs
    GUEST_CSUM: (taps.CSUM, 0),
    GUEST_TSO4: (taps.TSO4, GUEST_CSUM),
    GUEST_TSO6: (taps.TSO6, GUEST_CSUM),
    GUEST_ECN: (taps.ECN, GUEST_CSUM),
    GUEST_UFO: (taps.UFO, GUEST_CSUM),
    GUEST_USO4: (taps.USO4, GUEST_CSUM | GUEST_USO6),  # the TAP knows both together
    GUEST_USO6: (taps.USO6, GUEST_CSUM | GUEST_USO4),
}
ALL_OFFLOADS = sum(OFFLOADS)

LINK_UP = 1
OK, ERR = 0, 1  # what a control command is answered


class Net(VirtioDevice):
    """A network interface on ``tap``, which it owns. ``queue_size`` is that of each data queue.

    ``withheld`` are feature bits that are not to be offered.
    """

    id = ids.NET
    in_order = True

    def __init__(
        self,
        name: str,
        tap: Tap,
        mac: bytes,
        *,
        queue_size: int = 256,
        mtu: int | None = None,
        withheld: int = 0,
    ) -> None:
        self.tap = tap
        self.pair_count = len(tap.fds)
        self.queue_sizes = (queue_size,) * 2 * self.pair_count + (CONTROL_QUEUE_SIZE,)
        self.kicked_in_python = (2 * self.pair_count,)
        super().__init__(name)
        self.features = self._features(mtu is not None) & ~withheld
        self._factory_mac = self.mac = mac
        self._mtu = mtu or 0
        self.config = self._config()
        self.pairs = [self._pair(index) for index in range(self.pair_count)]
        self.active_pairs = 1
        self._offloads: int | None = None  # of OFFLOADS, as the driver said last; None: as negotiated
        self._rx_mode = dict.fromkeys(RX_MODES, False)
        self._table: tuple[list[bytes], list[bytes]] | None = None  # unicast, multicast; None: not told
        for index in range(1, self.pair_count):
            tap.set_attached(index, False)

    def _features(self, mtu: bool) -> int:
        features = ALWAYS | CHECKSUMS | TSO | UDP | (USO if self.tap.has_uso else 0)
        return features | (MTU if mtu else 0) | (MQ if self.pair_count > 1 else 0)

    def _config(self) -> bytes:
        """struct virtio_net_config as far as features make it known, 5.1.4."""
        return struct.pack("<6sHHH", self.mac, LINK_UP, self.pair_count, self._mtu)

    def _pair(self, index: int) -> Pair:
        rx, tx = self.queues[2 * index : 2 * index + 2]
        return Pair(f"{self.name}_qp{index}", self._engine_failed(index), rx, tx, self.tap.fds[index])

    def _engine_failed(self, index: int) -> "Callable[[int], None]":
        return lambda number: self.fail(self.pairs[index].fault or os.strerror(number))

    # -- life -------------------------------------------------------------------------------------

    def has(self, feature: int) -> bool:
        """Whether ``feature`` was negotiated."""
        return bool(self.driver_features & feature)

    @property
    def control_index(self) -> int:
        """The control queue's: a driver without MQ expects it behind the first pair (5.1.2)."""
        return 2 * self.pair_count if self.has(MQ) else 2

    def kicked(self, index: int) -> None:
        """The kick of a control queue at another index comes here by way of the first engine."""
        super().kicked(self.control_index)

    def activate(self) -> None:
        gso_types = sum(1 << kind for feature, kind in GSO_TYPES.items() if self.has(feature))
        for pair in self.pairs:
            pair.configure(
                self.has(MRG_RXBUF), self.has(GUEST_CSUM), self.has(CSUM), gso_types, self.has(HOST_ECN)
            )
        if self.control_index != 2 * self.pair_count and self.has(CTRL_VQ):
            self.pairs[0].forward(self.queues[2].kick_fd, self.queues[2 * self.pair_count].kick_fd)
        self._set_offloads()
        self._apply_filter()
        self._run(self.active_pairs if self.has(MQ) else 1)

    def reset(self) -> None:
        for pair in self.pairs:
            pair.stop()
            pair.forward(-1, -1)
        self.mac = self._factory_mac
        self.config = self._config()
        self.active_pairs, self._offloads, self._table = 1, None, None
        self._rx_mode = dict.fromkeys(RX_MODES, False)
        for index in range(1, self.pair_count):
            self._attach(index, False)

    def pause(self) -> None:
        """Until ``resume`` nothing moves, and the driver has all chains that no packet came for."""
        with self.lock:
            super().pause()  # the control queue, which could start a pair
            for pair in self.pairs:
                pair.stop()

    def resume(self) -> None:
        with self.lock:
            if self.memory is not None and not self.failed:
                self._run(self.active_pairs)
            super().resume()

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()
        super().close()
        self.tap.close()

    def state(self) -> "State":
        """To be asked for while paused."""
        table = None if self._table is None else [[each.hex() for each in part] for part in self._table]
        return {
            "mac": self.mac.hex(),
            "pairs": self.active_pairs,
            "offloads": self._offloads,
            "rx_mode": {str(command): on for command, on in self._rx_mode.items()},
            "table": table,
        }

    def restore(self, state: "State") -> None:
        """In force once the device is activated. Raises ValueError for a state that is not this device's."""
        mac, pairs = bytes.fromhex(state["mac"]), state["pairs"]
        if not mac_address.is_unicast(mac) or not 1 <= pairs <= self.pair_count:
            raise ValueError(f"{self.name}: {pairs} queue pairs were saved, there are {self.pair_count}")
        self.mac, self.active_pairs, self._offloads = mac, pairs, state["offloads"]
        self._rx_mode = {int(command): on for command, on in state["rx_mode"].items()}
        table = state["table"]
        self._table = table and tuple([bytes.fromhex(each) for each in part] for part in table)
        self.config = self._config()

    def counters(self) -> "dict[str, int]":
        """Frames and bytes so far, of all pairs; ``dropped`` are those that driver or host could not take."""
        return {name: sum(getattr(pair, name) for pair in self.pairs) for name in COUNTERS}

    def _run(self, count: int) -> None:
        """Let exactly the first ``count`` pairs work."""
        for index, pair in enumerate(self.pairs):
            if index < count and not pair.running:
                self.tap.set_attached(index, True)
                self._start(pair)
            elif index >= count and pair.running:
                self._attach(index, False)  # first, so that the host chooses among the others
                pair.stop()
        self.active_pairs = count

    def _start(self, pair: Pair) -> None:
        try:
            pair.start()
        except RuntimeError as error:
            raise HostError("start", f"a thread for {pair.name}", error) from error

    def _attach(self, index: int, attached: bool) -> None:
        try:
            self.tap.set_attached(index, attached)
        except HostError as error:
            log.limited(log.WARNING, f"{self.name}: {error}")

    # -- the control queue ------------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        queue, budget = self.queues[index], COMMAND_BATCH
        for chain in queue:
            queue.push_used(chain, self._answer(chain))
            budget -= 1
            if budget == 0:  # others on the control loop come first
                os.eventfd_write(self.queues[2 * self.pair_count].kick_fd, 1)
                break

    def _answer(self, chain: "Chain") -> int:
        if not chain.writable_len:
            raise GuestError("a control command has no room for its answer (5.1.6.5)")
        ack = ERR
        if 2 <= chain.readable_len <= MAX_COMMAND:
            command = chain.read()
            handler, needed = COMMANDS.get((command[0], command[1]), (None, 0))
            if handler is not None and self.has(needed) and handler(self, command[1], command[2:]):
                ack = OK
        return chain.write(bytes([ack]))

    def _set_rx_mode(self, command: int, data: bytes) -> bool:
        if len(data) != 1 or data[0] > 1:
            return False
        self._rx_mode[command] = bool(data[0])
        return self._filter()

    def _set_mac_table(self, _command: int, data: bytes) -> bool:
        unicast, rest = _addresses(data)
        multicast, rest = _addresses(rest) if rest is not None else (None, None)
        if unicast is None or multicast is None or rest:
            return False
        self._table = (unicast, multicast)
        return self._filter()

    def _set_mac(self, _command: int, data: bytes) -> bool:
        if len(data) != mac_address.SIZE or not mac_address.is_unicast(data):
            return False
        self.mac = data
        self.config = self._config()
        return self._filter()

    def _set_pairs(self, _command: int, data: bytes) -> bool:
        if len(data) != 2:
            return False
        count = int.from_bytes(data, "little")
        if not 1 <= count <= self.pair_count:
            return False
        if not all(queue.active for queue in self.queues[: 2 * count]):
            return False
        return self._tried(lambda: self._run(count))

    def _set_guest_offloads(self, _command: int, data: bytes) -> bool:
        if len(data) != 8:
            return False
        offloads = int.from_bytes(data, "little")
        if offloads & ~(self.driver_features & ALL_OFFLOADS):
            return False
        self._offloads = offloads
        return self._tried(self._set_offloads)

    def _tried(self, action: "Callable[[], object]") -> bool:
        try:
            action()
        except HostError as error:
            log.limited(log.WARNING, f"{self.name}: {error}")
            return False
        return True

    def _set_offloads(self) -> None:
        """Tell the TAP what the driver can take."""
        offloads = self.driver_features & ALL_OFFLOADS if self._offloads is None else self._offloads
        told = (
            flag
            for feature, (flag, needed) in OFFLOADS.items()
            if offloads & feature and offloads & needed == needed
        )
        self.tap.set_offloads(sum(told))

    def _filter(self) -> bool:
        return self._tried(self._apply_filter)

    def _apply_filter(self) -> None:
        """Tell the TAP which frames the driver wants: all, until it names addresses."""
        mode = self._rx_mode
        if self._table is None or mode[PROMISCUOUS] or mode[ALL_UNICAST]:
            if self.tap.filtered:
                self.tap.set_filter(None)
            return
        unicast, multicast = self._table
        wanted = [self.mac, *([] if mode[NO_UNICAST] else unicast)]
        if not mode[NO_BROADCAST]:
            wanted.append(mac_address.BROADCAST)
        if not mode[NO_MULTICAST]:
            wanted += multicast
        if len(wanted) > MAX_ADDRESSES:
            self.tap.set_filter(None)
        else:
            self.tap.set_filter(wanted, all_multicast=mode[ALL_MULTICAST] and not mode[NO_MULTICAST])


COUNTERS = ("rx_packets", "rx_bytes", "rx_dropped", "tx_packets", "tx_bytes", "tx_dropped")
PROMISCUOUS, ALL_MULTICAST, ALL_UNICAST, NO_MULTICAST, NO_UNICAST, NO_BROADCAST = range(6)
RX_MODES = range(6)
COMMANDS: "dict[tuple[int, int], tuple[Any, int]]" = {  # (class, command) -> who obeys, the feature it takes
    (0, PROMISCUOUS): (Net._set_rx_mode, CTRL_RX),
    (0, ALL_MULTICAST): (Net._set_rx_mode, CTRL_RX),
    (0, ALL_UNICAST): (Net._set_rx_mode, CTRL_RX_EXTRA),
    (0, NO_MULTICAST): (Net._set_rx_mode, CTRL_RX_EXTRA),
    (0, NO_UNICAST): (Net._set_rx_mode, CTRL_RX_EXTRA),
    (0, NO_BROADCAST): (Net._set_rx_mode, CTRL_RX_EXTRA),
    (1, 0): (Net._set_mac_table, CTRL_RX),
    (1, 1): (Net._set_mac, CTRL_MAC_ADDR),
    (4, 0): (Net._set_pairs, MQ),
    (5, 0): (Net._set_guest_offloads, CTRL_GUEST_OFFLOADS),
}


def _addresses(data: bytes) -> "tuple[list[bytes] | None, bytes | None]":
    """A table of MAC addresses behind its count, and what follows it; None, None where it ends early."""
    count = int.from_bytes(data[:4], "little")
    end = 4 + count * mac_address.SIZE
    if len(data) < max(end, 4):
        return None, None
    return [data[start : start + mac_address.SIZE] for start in range(4, end, mac_address.SIZE)], data[end:]


def open_net(config: "NetConfig", index: int, kind: type[Net] = Net) -> Net:
    """The device that ``config`` describes, the VM's ``index``-th. Raises HostError, and nothing is left."""
    tap, mac, mtu = open_host_side(config)
    try:
        return kind(
            config.id or f"_net{index}",
            tap,
            mac,
            queue_size=config.queue_size,
            mtu=mtu,
            withheld=_withheld(config),
        )
    except BaseException:
        tap.close()
        raise


def open_host_side(config: "NetConfig") -> tuple[Tap, bytes, int | None]:
    """The TAP of ``config``, set up; the guest's MAC address, and the MTU it is to know. Raises HostError."""
    tap = taps.adopt(config.fd) if config.fd else taps.open_tap(config.tap, config.num_queues // 2)
    try:
        mtu = _set_up(tap, config)
        return tap, mac_address.encode(config.mac) if config.mac else _default_mac(tap), mtu
    except BaseException:
        tap.close()
        raise


def _set_up(tap: Tap, config: "NetConfig") -> int | None:
    """Address and state of the interface as far as they were asked for; the MTU that the guest is to know."""
    with Interface(tap.name) as interface:
        ip = config.ip or (DEFAULT_IP if tap.made else None)
        if config.host_mac is not None:
            interface.mac = mac_address.encode(config.host_mac)
        if ip is not None:
            interface.set_address(ip, config.mask or _mask(ip))
        if config.mtu is not None:
            interface.mtu = config.mtu
        if config.fd:
            return config.mtu  # it may be in another namespace, and whoever passed it takes care of it
        interface.bring_up()
        mtu = interface.mtu
        return mtu if config.mtu is not None or mtu != USUAL_MTU else None


def _mask(ip: str) -> str:
    return "ffff:ffff:ffff:ffff::" if ":" in ip else DEFAULT_MASK


def _default_mac(tap: Tap) -> bytes:
    """A macvtap passes on only what is for its own address."""
    if not tap.macvtap:
        return mac_address.make()
    with Interface(tap.name) as interface:
        return interface.mac


def _withheld(config: "NetConfig") -> int:
    return (
        (0 if config.offload_csum else CHECKSUMS | TSO | UDP | USO)
        | (0 if config.offload_tso else TSO)
        | (0 if config.offload_ufo else UDP | USO)
    )

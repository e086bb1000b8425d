"""The guest's half of the network benchmark, and the host's: drives a device in another process, or a TAP.

``net_driver.py MODE MEMORY_FD RX_KICK_FD TX_KICK_FD KICK_TEXT INTERFACE LENGTH GSO SECONDS``

MODE is tx (guest to host), rx (host to guest) or rr (there and back, one at a time). plain-tx writes to the
TAP MEMORY_FD; plain-rx sends to INTERFACE and counts in memory, while plain-reader reads from the TAP
MEMORY_FD and its RX_KICK_FD is that memory. A kick is an eventfd's where KICK_TEXT is "-"; else that text and
the queue's number go to RX_KICK_FD, the socket of QEMU's qtest protocol. Rings lie at fixed places, see RINGS
here and in bench/net.py. GSO is the size of a segment, 0 for none: packets that have one are TCP over IPv4,
without a sum.

It prints "go" after a warm-up, in the end the packets and the seconds between; plain-reader just "ready".
"""

import os
import socket
import struct
import sys

from pileus.memory import GuestMemory, Region
from pileus.testing import F_INDIRECT, F_NEXT, F_WRITE
from pileus.testing._net_load import NetLoad, feed_plainly, send_plainly, take_plainly

SIZE, RINGS, TABLES, DATA, PAGE = 256, 0x10000, 0x100000, 0x400000, 4096
BATCH = 32
DESCRIPTOR = struct.Struct("<QIHH")
HEADER = struct.Struct("<BBHHHHH")  # flags, GSO type, header, segment, sum from, sum at, buffers
ETHERTYPE = 0x88B5  # for experiments: nobody listens
SOL_PACKET = 263  # <linux/socket.h>
PACKET_VNET_HDR, PACKET_QDISC_BYPASS = 15, 20  # <linux/if_packet.h>
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>
HOST, GUEST, NOBODY = (bytes.fromhex(each) for each in ("020000000001", "2e0000000001", "020000000099"))

Shape = tuple[int, int, float]  # bytes of a frame, bytes of a segment, seconds
Figures = tuple[int, float]  # packets, seconds


def main(mode: str, fd: int, kicks: tuple[int, int], text: str, interface: str, shape: Shape) -> None:
    if mode == "plain-reader":
        read(fd, kicks[0], shape[0])
    elif mode.startswith("plain"):
        print(*measure_plainly(mode, fd, interface, shape))
    else:
        print(*measure(mode, shared_memory(fd), kicks, text, interface, shape))


def measure(
    mode: str, memory: GuestMemory, kicks: tuple[int, int], text: str, interface: str, shape: Shape
) -> Figures:
    length, gso, seconds = shape
    if text == "-":
        load = NetLoad(memory, (RINGS, 2 * RINGS), kicks)
    else:
        texts = (f"{text} 0x0\n".encode(), f"{text} 0x1\n".encode())
        load = NetLoad(memory, (RINGS, 2 * RINGS), (kicks[0], kicks[0]), texts)
    if mode != "tx":
        describe_receive(load, PAGE if gso else 1536)
    if mode != "rx":
        describe_transmit(load, memory, from_guest(length, gso))
    if mode == "tx":
        return load.send(seconds)
    if mode == "rx":
        return load.receive(sender(interface, True), to_guest(length, gso), room(gso), seconds)
    packet = frame(length, 0, HOST, GUEST)
    return load.round_trips(sender(interface, False), listener(interface), packet, seconds)


def measure_plainly(mode: str, fd: int, interface: str, shape: Shape) -> Figures:
    length, gso, seconds = shape
    if mode == "plain-rx":
        packet = to_guest(length, gso)
        return feed_plainly(sender(interface, True), packet, room(gso), shared_memory(fd), seconds)
    packet = from_guest(length, gso)
    stride = pages(len(packet)) * PAGE
    memory = private_memory(SIZE * stride)  # as many as a ring has: the caches are to feel it
    for index in range(SIZE):
        memory.write(index * stride, packet)
    return send_plainly(fd, memory, stride, len(packet), seconds)


def read(tap: int, counter_fd: int, length: int) -> None:
    counter, buffers = shared_memory(counter_fd), private_memory((SIZE + BATCH) * PAGE)
    print("ready", flush=True)
    take_plainly(tap, counter, buffers, length)


# -- packets -------------------------------------------------------------------------------------------


def header(gso: int) -> bytes:
    """Of virtio-net. Source: virtio 1.2, 5.1.6"""
    return HEADER.pack(1, 1, 54, gso, 34, 16, 0) if gso else bytes(HEADER.size)


def frame(length: int, gso: int, source: bytes, target: bytes) -> bytes:
    """A frame that the host's stack drops early: it is for somebody else's MAC address."""
    if not gso:
        return (target + source + struct.pack(">H", ETHERTYPE)).ljust(length, b"\0")
    addresses = bytes((10, 0, 0, 2, 10, 0, 0, 1))
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length - 14, 1, 0, 64, socket.IPPROTO_TCP, 0) + addresses
    tcp = struct.pack(">HHIIBBHHH", 7, 7, 1, 1, 0x50, 0x10, 0x2000, 0, 0)
    return (target + source + b"\x08\0" + ip + tcp).ljust(length, b"\0")


def from_guest(length: int, gso: int) -> bytes:
    return header(gso) + frame(length, gso, GUEST, NOBODY)


def to_guest(length: int, gso: int) -> bytes:
    """A packet for a packet socket, whose header ends before the number of buffers."""
    return header(gso)[:10] + frame(length, gso, HOST, GUEST)


def room(gso: int) -> int:
    """Packets that the TAP's queue is sure to hold."""
    return 64 if gso else 512


def sender(interface: str, with_header: bool) -> int:
    door = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    door.bind((interface, 0))
    door.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
    door.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    if with_header:
        door.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    return door.detach()


def listener(interface: str) -> int:
    door = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    door.bind((interface, ETHERTYPE))
    return door.detach()


# -- memory --------------------------------------------------------------------------------------------


def shared_memory(fd: int) -> GuestMemory:
    return GuestMemory([(0, Region(fd, os.fstat(fd).st_size))])


def private_memory(size: int) -> GuestMemory:
    return GuestMemory([(0, Region(-1, size))])


def pages(length: int) -> int:
    return -(-length // PAGE)


def describe_receive(load: NetLoad, room: int) -> None:
    for index in range(SIZE):
        load.describe(False, index, DATA + index * PAGE, room, F_WRITE)


def describe_transmit(load: NetLoad, memory: GuestMemory, packet: bytes) -> None:
    """Each packet is one descriptor, or an indirect table as Linux makes it of page fragments."""
    count = pages(len(packet))
    for index in range(SIZE):
        gpa, table = DATA + index * count * PAGE, TABLES + index * 0x400
        memory.write(gpa, packet)
        if count == 1:
            load.describe(True, index, gpa, len(packet), 0)
            continue
        for at in range(count):
            here = min(len(packet) - at * PAGE, PAGE)
            more = F_NEXT if at < count - 1 else 0
            entry = DESCRIPTOR.pack(gpa + at * PAGE, here, more, at + 1)
            memory.write(table + at * DESCRIPTOR.size, entry)
        load.describe(True, index, table, count * DESCRIPTOR.size, F_INDIRECT)


mode, fd, rx_kick, tx_kick, text, interface, length, gso, seconds = sys.argv[1:]
main(mode, int(fd), (int(rx_kick), int(tx_kick)), text, interface, (int(length), int(gso), float(seconds)))

"""MAC addresses: six bytes, written as ``2e:12:34:56:78:9a``."""

import os

SIZE = 6
FIRST = 0x2E  # of those that are made here: individual, locally administered, as Cloud Hypervisor's
MULTICAST = 1  # in the first byte
BROADCAST = b"\xff" * SIZE


def encode(text: str) -> bytes:
    """The bytes of an address that ``config`` has judged already."""
    return bytes.fromhex(text.replace(":", ""))


def decode(address: bytes) -> str:
    return address.hex(":")


def make() -> bytes:
    """A new address, different from any other but for a chance of one in 2^40."""
    return bytes([FIRST]) + os.urandom(SIZE - 1)


def is_unicast(address: bytes) -> bool:
    """Whether one interface can have it."""
    return any(address) and not address[0] & MULTICAST

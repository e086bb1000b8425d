"""A network namespace of a test's own: what it makes there goes with it, and nobody else sees it."""

import ctypes
import os
import socket
import subprocess
from types import TracebackType
from typing import Self

import pytest

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
LIBC = ctypes.CDLL(None, use_errno=True)


def skip_unless_possible() -> None:
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/net/tun")


class Namespace:
    """The calling thread is in a new namespace, with lo up, until this is closed."""

    def __enter__(self) -> Self:
        skip_unless_possible()
        self._before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if LIBC.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        self.ip("link", "set", "lo", "up")
        # No router solicitations and the like: tests count frames.
        for scope in ("all", "default"):
            with open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w") as file:
                file.write("1")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        LIBC.setns(self._before, CLONE_NEWNET)
        os.close(self._before)

    def ip(self, *words: str) -> str:
        """What iproute2 answers."""
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout

    @property
    def links(self) -> list[str]:
        """The names of all interfaces."""
        return [line.split(":")[1].strip().partition("@")[0] for line in self.ip("-o", "link").splitlines()]


def packet_socket(interface: str) -> socket.socket:
    """Sends frames out of ``interface`` of the host, and receives what comes in there."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.bind((interface, ETH_P_ALL))
    sock.settimeout(5)
    return sock

"""A network interface of the host by its name: address, MTU, MAC, up.

Plain ioctls of this process's network namespace; each needs CAP_NET_ADMIN there, but those that only look.

Source: netdevice(7), ipv6(7) and <linux/sockios.h>
"""

import _socket  # socket itself would import enum, which every start would wait for
import errno
import fcntl
import os
import struct

from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

NAME_MAX = 15  # bytes, IFNAMSIZ without the NUL
IFREQ = 40  # bytes: the name and a union of 24
ARPHRD_ETHER = 1
IFF_UP = 1

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCGIFMTU = 0x8921
SIOCSIFMTU = 0x8922
SIOCSIFHWADDR = 0x8924
SIOCGIFHWADDR = 0x8927
SIOCGIFINDEX = 0x8933


class Interface:
    """The interface ``name``, which need not exist yet. A context manager; nothing it did is undone."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        except OSError as error:
            raise HostError("open a socket for", name, error) from error

    def __enter__(self) -> "Interface":
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: "BaseException | None",
        trace: "TracebackType | None",
    ) -> None:
        self._socket.close()

    @property
    def index(self) -> int | None:
        """Its number, None where there is no such interface."""
        try:
            return int(struct.unpack_from("=i", self._call(SIOCGIFINDEX), 16)[0])
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise HostError("look at", self.name, error) from error

    @property
    def mtu(self) -> int:
        """The largest packet in bytes, without its Ethernet header."""
        return int(struct.unpack_from("=i", self._ask("look at the MTU of", SIOCGIFMTU), 16)[0])

    @mtu.setter
    def mtu(self, size: int) -> None:
        self._ask(f"set an MTU of {size} on", SIOCSIFMTU, struct.pack("=i", size))

    @property
    def mac(self) -> bytes:
        return self._ask("look at the MAC address of", SIOCGIFHWADDR)[18:24]

    @mac.setter
    def mac(self, address: bytes) -> None:
        argument = struct.pack("=H6s", ARPHRD_ETHER, address)
        self._ask(f"give the MAC address {address.hex(':')} to", SIOCSIFHWADDR, argument)

    def bring_up(self) -> None:
        flags = struct.unpack_from("=H", self._ask("look at", SIOCGIFFLAGS), 16)[0]
        if not flags & IFF_UP:
            self._ask("bring up", SIOCSIFFLAGS, struct.pack("=H", flags | IFF_UP))

    def set_address(self, ip: str, mask: str) -> None:
        """Give it the address ``ip`` of the network that ``mask`` cuts out, both of one family."""
        doing = f"give the address {ip} to"
        if ":" in ip:
            self._set_ipv6(doing, ip, mask)
            return
        self._ask(doing, SIOCSIFADDR, _sockaddr(ip))
        self._ask(f"set the netmask {mask} on", SIOCSIFNETMASK, _sockaddr(mask))

    def _set_ipv6(self, doing: str, ip: str, mask: str) -> None:
        length = int.from_bytes(_socket.inet_pton(_socket.AF_INET6, mask), "big").bit_count()
        request = struct.pack("=16sIi", _socket.inet_pton(_socket.AF_INET6, ip), length, self.index or 0)
        try:
            six = _socket.socket(_socket.AF_INET6, _socket.SOCK_DGRAM)
            try:
                fcntl.ioctl(six.fileno(), SIOCSIFADDR, request)
            finally:
                six.close()
        except OSError as error:
            if error.errno != errno.EEXIST:  # it has that address already
                raise HostError(doing, self.name, reason(error)) from error

    def _ask(self, doing: str, number: int, argument: bytes = b"") -> bytes:
        try:
            return self._call(number, argument)
        except OSError as error:
            raise HostError(doing, self.name, reason(error)) from error

    def _call(self, number: int, argument: bytes = b"") -> bytes:
        request = self.name.encode(errors="surrogateescape").ljust(16, b"\0") + argument
        return fcntl.ioctl(self._socket.fileno(), number, request.ljust(IFREQ, b"\0"))


def reason(error: OSError) -> str:
    """What went wrong, and what would help where that is known."""
    text = os.strerror(error.errno or 0)
    return f"{text}; it takes CAP_NET_ADMIN" if error.errno in (errno.EPERM, errno.EACCES) else text


def _sockaddr(ip: str) -> bytes:
    return struct.pack("=HH4s", _socket.AF_INET, 0, _socket.inet_pton(_socket.AF_INET, ip))

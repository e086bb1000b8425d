"""TAP interfaces: Ethernet frames of the host's network, read and written through file descriptors.

One descriptor a queue pair, each frame behind the 12 bytes of struct virtio_net_hdr_v1, as the guest's driver
and the host's kernel both know it: large packets and missing checksums pass through as they are.

A TAP that was made here goes with its descriptors. One that was there stays, as does what was asked for it.

Source: <linux/if_tun.h>, Documentation/networking/tuntap.rst and drivers/net/tap.c (macvtap) of Linux
"""

import errno
import fcntl
import os
import struct

from pileus.errors import HostError
from pileus.net.interface import IFREQ, Interface, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE = "/dev/net/tun"
PATTERN = "vmtap%d"  # the kernel puts the lowest free number in
HEADER_SIZE = 12  # bytes before each frame
TUN_NUMBER = os.makedev(10, 200)  # of DEVICE, <linux/miscdevice.h>

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETTXFILTER = 0x400454D1
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

CSUM, TSO4, TSO6, ECN, UFO, USO4, USO6 = (1 << bit for bit in range(7))  # TUN_F_…: what a reader can take

FILTER_ALL_MULTICAST = 1  # TUN_FLT_ALLMULTI


class Tap:
    """The TAP ``name`` behind ``fds``, which it owns; made by ``open_tap``, ``open_macvtap`` or ``adopt``."""

    def __init__(self, name: str, fds: "Sequence[int]", *, made: bool = False, macvtap: bool = False) -> None:
        self.name = name
        self.fds = list(fds)
        self.made = made  # it did not exist before
        self.macvtap = macvtap
        self.filtered = False
        self.has_uso = False  # large UDP packets: Linux 6.2
        self._attached: list[bool | None] = [True] * len(self.fds)  # None: who had them before may tell

    def prepare(self) -> None:
        """Set the descriptors up as the engines need them. Raises HostError."""
        for fd in self.fds:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
            self._call(fd, "set the header size of", TUNSETVNETHDRSZ, struct.pack("=i", HEADER_SIZE))
        self.has_uso = self._takes_offloads(CSUM | USO4 | USO6)
        self.set_offloads(0)

    def close(self) -> None:
        """What was made here vanishes; elsewhere no filter of the guest and no queue at rest is left."""
        if self.fds and not self.made:
            try:
                for index in range(len(self.fds)):
                    self.set_attached(index, True)
                if self.filtered:
                    self.set_filter(None)
            except HostError:
                pass  # its interface is gone
        while self.fds:
            os.close(self.fds.pop())

    def set_offloads(self, offloads: int) -> None:
        """What the guest can take: of ``CSUM`` and, with it, the large packets. Raises HostError."""
        for fd in self.fds if self.macvtap else self.fds[:1]:
            self._call(fd, f"set the offloads {offloads:#x} of", TUNSETOFFLOAD, offloads)

    def set_attached(self, index: int, attached: bool) -> None:
        """Whether the host puts frames into queue ``index`` of a TAP with more than one."""
        if len(self.fds) == 1 or self._attached[index] == attached:
            return
        flags = IFF_ATTACH_QUEUE if attached else IFF_DETACH_QUEUE
        request = struct.pack("=16sH", b"", flags).ljust(IFREQ, b"\0")
        try:
            fcntl.ioctl(self.fds[index], TUNSETQUEUE, request)
        except OSError as error:
            if error.errno != errno.EINVAL or self._attached[index] is not None:  # it is so already
                doing = f"{'attach' if attached else 'detach'} queue {index} of"
                raise HostError(doing, f"TAP {self.name}", reason(error)) from error
        self._attached[index] = attached

    def set_filter(self, addresses: "Sequence[bytes] | None", *, all_multicast: bool = False) -> bool:
        """Give the guest only frames for ``addresses``; all where that is None. False: this kind cannot.

        The kernel keeps a hash of multicast addresses, so a few more may pass; where more than eight unicast
        ones are asked for it gives up, and all pass.
        """
        if self.macvtap:
            return False
        flags = FILTER_ALL_MULTICAST if all_multicast else 0
        count = 0 if addresses is None else len(addresses)
        request = struct.pack("=HH", flags, count) + b"".join(addresses or ())
        self._call(self.fds[0], "filter the frames of", TUNSETTXFILTER, request)
        self.filtered = addresses is not None
        return True

    def _takes_offloads(self, offloads: int) -> bool:
        try:
            fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, offloads)
        except OSError:
            return False
        return True

    def _call(self, fd: int, doing: str, number: int, argument: "bytes | int") -> None:
        try:
            fcntl.ioctl(fd, number, argument)
        except OSError as error:
            raise HostError(doing, f"TAP {self.name}", reason(error)) from error


def open_tap(name: str | None, queues: int) -> Tap:
    """The TAP ``name``, made if there is none; with no name a new one. Raises HostError."""
    made = name is None
    if name is not None:
        with Interface(name) as interface:
            index = interface.index
        if index is not None and _is_macvtap(name, index):
            return _open_macvtap(name, index, queues)
        made = index is None
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(_open(DEVICE))
            name = _attach(fds[-1], name or PATTERN, queues, made=made)
        assert name is not None
        return _prepared(Tap(name, fds, made=made))
    except BaseException:
        _close(fds)
        raise


def adopt(fds: "Sequence[int]") -> Tap:
    """The TAP behind inherited descriptors, a queue each. Raises HostError.

    It works on copies of them: they stay open for the VM after a reboot.
    """
    names = [_name_behind(fd) for fd in fds]
    for fd, (name, macvtap, flags) in zip(fds, names, strict=True):
        what = f"fd {fd}"
        if name != names[0][0]:
            raise HostError("use", what, f"it belongs to {name}, fd {fds[0]} to {names[0][0]}")
        if not (flags & IFF_TAP and flags & IFF_VNET_HDR and flags & IFF_NO_PI):
            raise HostError("use", what, f"{name} must be a TAP opened with IFF_NO_PI and IFF_VNET_HDR")
        if len(fds) > 1 and not flags & IFF_MULTI_QUEUE and not macvtap:
            raise HostError("use", what, f"{name} must be opened with IFF_MULTI_QUEUE for several fds")
    tap = _prepared(Tap(names[0][0], [os.dup(fd) for fd in fds], macvtap=names[0][1]))
    tap._attached = [None] * len(fds)  # a process that died may have left some at rest
    return tap


def _prepared(tap: Tap) -> Tap:
    tap.prepare()
    return tap


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        hint = "is the kernel's tun module loaded?" if path == DEVICE else "does udev make it?"
        raise HostError("open", path, f"{os.strerror(errno.ENOENT)}; {hint}") from error
    except OSError as error:
        raise HostError("open", path, reason(error)) from error


def _attach(fd: int, name: str, queues: int, *, made: bool) -> str:
    """Make ``fd`` a queue of the TAP ``name``; returns the name it has got."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    doing, what = "make" if made else "open", "a TAP" if name == PATTERN else f"TAP {name}"
    try:
        try:
            answer = _set_interface(fd, name, flags)
        except OSError as error:
            if error.errno != errno.EINVAL or queues > 1:
                raise
            answer = _set_interface(fd, name, flags | IFF_MULTI_QUEUE)  # it was made for several
    except OSError as error:
        raise HostError(doing, what, _refusal(name, queues, error)) from error
    return answer[:16].partition(b"\0")[0].decode(errors="surrogateescape")


def _set_interface(fd: int, name: str, flags: int) -> bytes:
    request = struct.pack("=16sH", name.encode(errors="surrogateescape"), flags)
    return fcntl.ioctl(fd, TUNSETIFF, request.ljust(IFREQ, b"\0"))


def _refusal(name: str, queues: int, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        users = ", ".join(_users(name))
        return f"{os.strerror(errno.EBUSY)}; {users or 'another process'} uses it"
    if error.errno == errno.EINVAL:
        several = " or has one queue only: num_queues=2 suits it" if queues > 1 else ""
        return f"{name} is no TAP{several}"
    return reason(error)


def _users(name: str) -> "list[str]":
    """The processes that hold a descriptor of the TAP ``name``, as far as we may look."""
    line = f"iff:\t{name}\n"
    return [
        f"{_read(f'/proc/{pid}/comm').strip()} (process {pid})"
        for pid in os.listdir("/proc")
        if pid.isdecimal()
        and any(line in _read(f"/proc/{pid}/fdinfo/{fd}") for fd in _names(f"/proc/{pid}/fdinfo"))
    ]


def _names(folder: str) -> "list[str]":
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _is_macvtap(name: str, index: int) -> bool:
    """Whether the device that a macvtap of this number has is that of ``name``: namespaces number alike."""
    path = f"/dev/tap{index}"
    if not os.path.exists(path):
        return False
    fd = _open(path)
    try:
        return _name_behind(fd)[0] == name
    except HostError:
        return False
    finally:
        os.close(fd)


def _open_macvtap(name: str, index: int, queues: int) -> Tap:
    """The macvtap ``name``: udev makes a device for it, whose every opening is a queue."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(_open(f"/dev/tap{index}"))
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
            try:
                _set_interface(fds[-1], name, flags)
            except OSError as error:
                raise HostError("open", f"macvtap {name}", reason(error)) from error
        return _prepared(Tap(name, fds, macvtap=True))
    except BaseException:
        _close(fds)
        raise


def _name_behind(fd: int) -> tuple[str, bool, int]:
    """The name, whether it is a macvtap, and the flags of the interface that ``fd`` is a queue of."""
    try:
        answer = fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ))
        number = os.fstat(fd).st_rdev
    except OSError as error:
        text = "it is not open" if error.errno == errno.EBADF else "it is no TAP"
        raise HostError("use", f"fd {fd}", text) from error
    name, flags = struct.unpack_from("=16sH", answer)
    decoded = name.partition(b"\0")[0].decode(errors="surrogateescape")
    return decoded, number != TUN_NUMBER, flags

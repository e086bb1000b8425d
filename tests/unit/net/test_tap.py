"""TAPs of the host: made, taken by name, inherited; and left as they should be."""

import ctypes
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.errors import HostError
from pileus.net import tap
from pileus.net.interface import Interface
from pileus.net.tap import Tap, adopt, open_tap
from tests.unit.net.namespace import LIBC, Namespace, packet_socket

PR_CAPBSET_DROP, CAP_NET_ADMIN = 24, 12


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_is_left(host: Namespace) -> Iterator[None]:
    before = open_fds(), host.links
    yield
    while (name := host.links[-1]) != "lo":
        host.ip("link", "del", name)
    assert (open_fds(), host.links) == before


def flags_of(host: Namespace, name: str) -> str:
    return host.ip("-d", "link", "show", name)


def test_a_tap_without_a_name_is_new(host: Namespace) -> None:
    first, second = open_tap(None, 1), open_tap(None, 1)
    assert (first.name, second.name) == ("vmtap0", "vmtap1")
    assert first.made
    assert host.links == ["lo", "vmtap0", "vmtap1"]
    first.close()
    second.close()
    assert host.links == ["lo"]


def test_a_name_that_nobody_has_is_made_and_goes(host: Namespace) -> None:
    made = open_tap("mine", 2)
    assert made.made
    assert "multi_queue" in flags_of(host, "mine")
    made.close()
    made.close()
    assert host.links == ["lo"]


@pytest.mark.parametrize("more", [[], ["multi_queue"]], ids=["single queue", "multi-queue"])
def test_a_tap_of_the_user_stays_as_it_was(host: Namespace, more: list[str]) -> None:
    host.ip("tuntap", "add", "name", "theirs", "mode", "tap", *more)
    host.ip("addr", "add", "10.1.2.3/24", "dev", "theirs")
    with_address = host.ip("-o", "addr", "show", "theirs")
    taken = open_tap("theirs", 1)
    assert not taken.made
    taken.close()
    assert host.ip("-o", "addr", "show", "theirs") == with_address


def test_a_tap_in_use_says_by_whom(host: Namespace) -> None:
    taken = open_tap("mine", 1)
    with pytest.raises(
        HostError, match=r"^cannot open TAP mine: Device or resource busy; .* uses it$"
    ) as caught:
        open_tap("mine", 1)
    assert f"process {os.getpid()}" in str(caught.value)
    taken.close()


def test_what_is_no_tap_is_refused(host: Namespace) -> None:
    host.ip("link", "add", "b0", "type", "bridge")
    with pytest.raises(HostError, match=r"^cannot open TAP b0: b0 is no TAP$"):
        open_tap("b0", 1)


def test_a_tap_with_one_queue_has_no_second(host: Namespace) -> None:
    host.ip("tuntap", "add", "name", "theirs", "mode", "tap")
    with pytest.raises(HostError, match=r"has one queue only: num_queues=2 suits it$"):
        open_tap("theirs", 2)
    assert "theirs" in host.links


def without_privileges(act: str) -> str:
    """What ``act`` raises in a child that may not administrate the network."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            LIBC.capset(header, nothing)
            exec(act, globals())
            text = "nothing"
        except HostError as error:
            text = str(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    os.waitpid(child, 0)
    return told


@pytest.mark.usefixtures("host")
def test_without_the_capability_it_is_named() -> None:
    told = without_privileges("open_tap(None, 1)")
    assert told == "cannot make a TAP: Operation not permitted; it takes CAP_NET_ADMIN"
    told = without_privileges("Interface('lo').mtu = 1500")
    assert told == "cannot set an MTU of 1500 on lo: Operation not permitted; it takes CAP_NET_ADMIN"


def test_without_the_driver_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "DEVICE", "/nonexistent/tun")
    with pytest.raises(HostError, match=r"^cannot open /nonexistent/tun: No such file or directory; is the"):
        open_tap(None, 1)


# -- inherited descriptors ------------------------------------------------------------------------


def raw_tap(name: str, flags: int) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, tap.TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
    return fd


GOOD = tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR


@pytest.mark.usefixtures("host")
def test_inherited_descriptors_are_copied_and_stay_open() -> None:
    fds = [raw_tap("theirs", GOOD | tap.IFF_MULTI_QUEUE) for _ in range(2)]
    adopted = adopt(fds)
    assert (adopted.name, len(adopted.fds), adopted.made) == ("theirs", 2, False)
    for fd in adopted.fds:
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
    adopted.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.usefixtures("host")
def test_descriptors_of_queues_at_rest_can_be_taken_again() -> None:
    """A queue that is detached does not know its TAP, and neither do copies of it."""
    fds = [raw_tap("theirs", GOOD | tap.IFF_MULTI_QUEUE) for _ in range(2)]
    for _ in range(2):
        adopted = adopt(fds)
        adopted.set_attached(1, False)
        adopted.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.usefixtures("host")
def test_bad_descriptors_are_refused_and_stay_the_caller_s() -> None:
    no_header = raw_tap("a", tap.IFF_TAP | tap.IFF_NO_PI)
    tun = raw_tap("b", 1 | tap.IFF_NO_PI | tap.IFF_VNET_HDR)
    unattached = os.open("/dev/net/tun", os.O_RDWR)
    null = os.open("/dev/null", os.O_RDWR)
    one, other = raw_tap("c", GOOD), raw_tap("d", GOOD | tap.IFF_MULTI_QUEUE)
    for fds, words in {
        (no_header,): f"fd {no_header}: a must be a TAP opened with IFF_NO_PI and IFF_VNET_HDR",
        (tun,): f"fd {tun}: b must be a TAP",
        (unattached,): f"fd {unattached}: it is no TAP",
        (null,): f"fd {null}: it is no TAP",
        (9999,): "fd 9999: it is not open",
        (other, one): f"fd {one}: it belongs to c, fd {other} to d",
        (one, one): f"fd {one}: c must be opened with IFF_MULTI_QUEUE",
    }.items():
        with pytest.raises(HostError) as caught:
            adopt(fds)
        assert str(caught.value).startswith(f"cannot use {words}")
    for fd in (no_header, tun, unattached, null, one, other):
        os.close(fd)


# -- macvtap --------------------------------------------------------------------------------------


@pytest.fixture
def macvtap(host: Namespace) -> Iterator[Tap]:
    host.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
    try:
        host.ip("link", "add", "link", "v0", "name", "mv0", "type", "macvtap", "mode", "bridge")
    except Exception:
        pytest.skip("this kernel has no macvtap")
    for name in ("v0", "v1", "mv0"):
        host.ip("link", "set", name, "up")
    with Interface("mv0") as interface:
        index = interface.index
    device = Path(f"/dev/tap{index}")
    # What udev does; sysfs of this namespace tells the number.
    if not device.exists():
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(*macvtap_number(index)))
        made = True
    else:
        made = False
    try:
        opened = open_tap("mv0", 2)
        yield opened
        opened.close()
    finally:
        if made:
            device.unlink()


def macvtap_number(index: int | None) -> tuple[int, int]:
    """Major and minor number, out of a sysfs that belongs to this namespace."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        LIBC.unshare(0x00020000)  # CLONE_NEWNS
        LIBC.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
        LIBC.mount(b"sysfs", b"/sys", b"sysfs", 0, None)
        os.write(writer, Path(f"/sys/class/net/mv0/tap{index}/dev").read_bytes())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        major, minor = file.read().split(":")
    os.wait()
    return int(major), int(minor)


def test_a_macvtap_is_opened_by_its_device(host: Namespace, macvtap: Tap) -> None:
    assert macvtap.macvtap
    assert (macvtap.name, len(macvtap.fds)) == ("mv0", 2)
    with Interface("mv0") as interface:
        address = interface.mac
    sender = packet_socket("v1")
    frame = address + b"\2" * 6 + b"\x88\xb5" + b"hello".ljust(60, b".")
    sender.send(frame)
    assert any(frame in read(fd) for fd in macvtap.fds)
    macvtap.set_attached(1, False)
    for number in range(20):
        sender.send(frame[:-1] + bytes([number]))
    received = [read(macvtap.fds[0]) for _ in range(20)]
    assert all(frame[:-1] in each for each in received)
    assert not read(macvtap.fds[1])
    macvtap.set_attached(1, True)
    os.write(macvtap.fds[0], bytes(12) + b"\xff" * 6 + address + b"\x88\xb5" + b"answer".ljust(60, b"."))
    assert any(b"answer" in sender.recv(2000) for _ in range(5))
    sender.close()


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 2000)
    except BlockingIOError:
        return b""


# -- the interface --------------------------------------------------------------------------------


def test_an_interface_is_set_up(host: Namespace) -> None:
    made = open_tap(None, 1)
    with Interface(made.name) as interface:
        interface.mtu = 9000
        interface.mac = b"\2\0\0\0\0\7"
        interface.set_address("10.9.8.7", "255.255.0.0")
        interface.bring_up()
        interface.bring_up()
        assert interface.mtu == 9000
        assert interface.mac == b"\2\0\0\0\0\7"
    assert "inet 10.9.8.7/16 brd 10.9.255.255" in host.ip("addr", "show", made.name)
    assert "UP" in flags_of(host, made.name)
    made.close()


def test_an_interface_has_ipv6_too(host: Namespace) -> None:
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("0")
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("0")
    made = open_tap(None, 1)
    with Interface(made.name) as interface:
        interface.set_address("fd00::1", "ffff:ffff:ffff::")
        interface.set_address("fd00::1", "ffff:ffff:ffff::")
    assert "inet6 fd00::1/48" in host.ip("addr", "show", made.name)
    made.close()


@pytest.mark.usefixtures("host")
def test_what_the_kernel_refuses_is_told() -> None:
    with Interface("nobody") as interface:
        assert interface.index is None
        with pytest.raises(HostError, match=r"^cannot bring up|^cannot look at nobody: No such device$"):
            interface.bring_up()
    made = open_tap(None, 1)
    with Interface(made.name) as interface:
        with pytest.raises(HostError, match=r"^cannot set an MTU of 20 on vmtap0: Invalid argument$"):
            interface.mtu = 20
        with pytest.raises(HostError, match=r"^cannot give the MAC address 01:00:00:00:00:00 to vmtap0: "):
            interface.mac = b"\1\0\0\0\0\0"
    made.close()

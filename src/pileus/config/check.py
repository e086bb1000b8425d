"""Rules that span fields: what each field allows by itself, its kind has judged already.

A rule raises ConfigError with the values at odds and what would do; ``RULES`` is all of them. What depends on
the host (its CPUs, its files, its huge pages) is judged where the host is asked.
"""

from pileus.config.grammar import format_struct, shown
from pileus.config.units import GIB, KIB, MIB, format_size
from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.declare import Struct
    from pileus.config.model import MemoryConfig, NetConfig, SerialConfig, VmConfig, VmmConfig

MIN_MEMORY = 2 * MIB  # what boot protocols use below 1 MiB, and the least of kernels above
PAGE_SIZE = 4 * KIB
STDERR = 2
SOCKET_PATH_LIMIT = 107 - len("_4294967295")  # bytes: what sun_path holds, less the longest port
HUGE_PAGE_SIZES = (2 * MIB, GIB)  # what x86 has


def check(config: "VmmConfig") -> None:
    """Judge a whole process's configuration. Raises ConfigError for the first rule that is broken."""
    socket = config.api_socket
    if socket.path is not None and socket.fd is not None:
        raise _at_odds("--api-socket", socket, ("path", "fd"), "one of path and fd is enough")
    if config.vm is not None:
        check_vm(config.vm)


def check_vm(vm: "VmConfig") -> None:
    """Judge one VM, from the command line or the API. Raises ConfigError for the first broken rule."""
    for rule in RULES:
        rule(vm)


def _vcpus(vm: "VmConfig") -> None:
    cpus = vm.cpus
    if cpus.boot > cpus.max:
        raise _at_odds("--cpus", cpus, ("boot", "max"), "boot may be at most max")


def _topology(vm: "VmConfig") -> None:
    cpus = vm.cpus
    if cpus.topology is None:
        return
    threads, cores, dies, packages = cpus.topology
    if (product := threads * cores * dies * packages) != cpus.max:
        allowed = f"the topology's product ({product}) must equal max ({cpus.max})"
        raise _at_odds("--cpus", cpus, ("max", "topology"), allowed)


def _affinity(vm: "VmConfig") -> None:
    for vcpu in vm.cpus.affinity or ():
        if vcpu >= vm.cpus.max:
            allowed = f"there is no vCPU {vcpu}; they are 0 to {vm.cpus.max - 1}"
            raise _at_odds("--cpus", vm.cpus, ("max", "affinity"), allowed)


def _memory_size(vm: "VmConfig") -> None:
    memory = vm.memory
    unit = _page_size(memory)
    least = max(MIN_MEMORY, unit)
    if memory.size < least:
        raise _at_odds("--memory", memory, ("size",), f"size is at least {format_size(least)}")
    if memory.size % unit:
        keys = ("size", "hugepages") if memory.hugepages else ("size",)
        raise _at_odds("--memory", memory, keys, f"size is a multiple of {format_size(unit)}")


def _huge_pages(vm: "VmConfig") -> None:
    memory = vm.memory
    if memory.hugepage_size is not None and not memory.hugepages:
        raise _at_odds("--memory", memory, ("hugepage_size",), "hugepage_size needs hugepages=on")
    if memory.hugepage_size not in (None, *HUGE_PAGE_SIZES):
        sizes = " or ".join(map(format_size, HUGE_PAGE_SIZES))
        raise _at_odds("--memory", memory, ("hugepage_size",), f"hugepage_size is {sizes}")


def _memory_origin(vm: "VmConfig") -> None:
    memory = vm.memory
    if memory.file is not None and memory.hugepages:
        allowed = "only one is possible; for huge pages in a file, name one on a hugetlbfs mount"
        raise _at_odds("--memory", memory, ("file", "hugepages"), allowed)
    for key in ("shared", "hugepages"):
        if memory.mergeable and getattr(memory, key):
            allowed = "the host merges only small pages that are not shared"
            raise _at_odds("--memory", memory, ("mergeable", key), allowed)


def _payload(vm: "VmConfig") -> None:
    payload = vm.payload
    for key in ("cmdline", "initramfs"):
        if getattr(payload, key) and payload.kernel is None:
            raise ConfigError(f"--{key}", shown(getattr(payload, key)), "--kernel is needed as well")


def _terminals(vm: "VmConfig") -> None:
    _terminal("--serial", vm.serial)
    _terminal("--console", vm.console)
    if vm.serial.mode == vm.console.mode == "tty":
        allowed = "--serial is tty too, and there is one terminal; make one of them off, null, pty or a file"
        raise ConfigError("--console", "tty", allowed)
    if vm.serial.path is not None and vm.serial.path == vm.console.path:
        allowed = "--serial has this path too; each needs its own"
        raise ConfigError("--console", shown(vm.serial.path), allowed)


def _terminal(option: str, terminal: "SerialConfig") -> None:
    """A file belongs to the mode ``file`` and to no other, likewise a socket."""
    for key in ("file", "socket"):
        path = getattr(terminal, key)
        if terminal.mode == key and path is None:
            raise ConfigError(option, key, f"write {key}=PATH")
        if terminal.mode != key and path is not None:
            allowed = f"only one of {terminal.mode} and {key}= is possible"
            raise ConfigError(option, shown(f"{terminal.mode},{key}={path}"), allowed)


def _nets(vm: "VmConfig") -> None:
    for net in vm.net:
        _net(net)
    for key in ("id", "mac", "tap"):
        given = [net for net in vm.net if getattr(net, key) is not None]
        for index, net in enumerate(given):
            if any(getattr(other, key) == getattr(net, key) for other in given[:index]):
                raise _at_odds("--net", net, (key,), f"another interface has this {key} already")
    fds = [fd for net in vm.net for fd in net.fd or ()]
    for net in vm.net:
        if any(fds.count(fd) > 1 for fd in net.fd or ()):
            raise _at_odds("--net", net, ("fd",), "another interface has one of them too")


def _net(net: "NetConfig") -> None:
    if net.num_queues % 2:
        raise _at_odds("--net", net, ("num_queues",), "receive and transmit queues make an even number")
    if net.queue_size & (net.queue_size - 1):
        raise _at_odds("--net", net, ("queue_size",), "a queue's size is a power of two")
    if net.fd is not None:
        if net.tap is not None:
            raise _at_odds("--net", net, ("tap", "fd"), "one of tap and fd is enough")
        if 2 * len(net.fd) != net.num_queues:
            allowed = f"num_queues is twice the number of descriptors, {2 * len(net.fd)}"
            raise _at_odds("--net", net, ("fd", "num_queues"), allowed)
        if net.fd[0] <= STDERR:
            raise _at_odds("--net", net, ("fd",), "0 to 2 are standard input, output and error")
    if net.mask is not None and (":" in net.mask) != (":" in (net.ip or "")):
        raise _at_odds("--net", net, ("ip", "mask"), "ip and mask are both of IPv4 or both of IPv6")


def _vsock(vm: "VmConfig") -> None:
    vsock = vm.vsock
    if vsock is None:
        return
    if len(vsock.socket.encode(errors="surrogatepass")) > SOCKET_PATH_LIMIT:
        allowed = f"socket is a path of at most {SOCKET_PATH_LIMIT} bytes, so that _PORT fits behind it"
        raise _at_odds("--vsock", vsock, ("socket",), allowed)
    for option, terminal in (("--serial", vm.serial), ("--console", vm.console)):
        if vsock.socket == terminal.path:
            raise _at_odds("--vsock", vsock, ("socket",), f"{option} has this path too; each needs its own")
    if vsock.id is not None and any(net.id == vsock.id for net in vm.net):
        raise _at_odds("--vsock", vsock, ("id",), "a network interface has this id already")


def _page_size(memory: "MemoryConfig") -> int:
    """What the size is a multiple of: the least huge page where the host will choose."""
    return (memory.hugepage_size or HUGE_PAGE_SIZES[0]) if memory.hugepages else PAGE_SIZE


def _at_odds(option: str, struct: "Struct", keys: tuple[str, ...], allowed: str) -> ConfigError:
    return ConfigError(option, shown(format_struct(struct, *keys)), allowed)


RULES = (
    _vcpus,
    _topology,
    _affinity,
    _huge_pages,
    _memory_size,
    _memory_origin,
    _payload,
    _terminals,
    _nets,
    _vsock,
)

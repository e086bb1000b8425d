"""Rules that span fields: what each field allows by itself, its kind has judged already.

A rule raises ConfigError with the values at odds and what would do; ``RULES`` is all of them. What depends on
the host (its CPUs, its files, its huge pages) is judged where the host is asked.
"""

from pileus.config.grammar import format_struct, shown
from pileus.config.units import GIB, KIB, MIB, format_size
from pileus.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pileus.config.declare import Struct
    from pileus.config.model import (
        DeviceConfig,
        DiskConfig,
        FsConfig,
        MemoryConfig,
        NetConfig,
        SerialConfig,
        UserDeviceConfig,
        VhostUserBlkConfig,
        VhostUserNetConfig,
        VmConfig,
        VmmConfig,
    )

MIN_MEMORY = 2 * MIB  # what boot protocols use below 1 MiB, and the least of kernels above
PAGE_SIZE = 4 * KIB
STDERR = 2
SOCKET_LIMIT = 107  # bytes of a Unix socket's path: what sun_path holds
SOCKET_PATH_LIMIT = SOCKET_LIMIT - len("_4294967295")  # less the longest port
HUGE_PAGE_SIZES = (2 * MIB, GIB)  # what x86 has
PMEM_UNIT = 2 * MIB  # guests map persistent memory in huge pages
MAX_PMEM = 32


def check(config: "VmmConfig") -> None:
    """Judge a whole process's configuration. Raises ConfigError for the first rule that is broken."""
    socket = config.api_socket
    if socket is not None and socket.path is not None and socket.fd is not None:
        raise at_odds("--api-socket", socket, ("path", "fd"), "one of path and fd is enough")
    monitor = config.event_monitor
    if monitor is not None and (monitor.path is None) == (monitor.fd is None):
        raise at_odds("--event-monitor", monitor, ("path", "fd"), "one of path and fd is needed")
    if config.vm is not None:
        check_vm(config.vm)


def check_vm(vm: "VmConfig") -> None:
    """Judge one VM, from the command line or the API. Raises ConfigError for the first broken rule."""
    for rule in RULES:
        rule(vm)


def _vcpus(vm: "VmConfig") -> None:
    cpus = vm.cpus
    if cpus.boot > cpus.max:
        raise at_odds("--cpus", cpus, ("boot", "max"), "boot may be at most max")


def _topology(vm: "VmConfig") -> None:
    cpus = vm.cpus
    if cpus.topology is None:
        return
    threads, cores, dies, packages = cpus.topology
    if (product := threads * cores * dies * packages) != cpus.max:
        allowed = f"the topology's product ({product}) must equal max ({cpus.max})"
        raise at_odds("--cpus", cpus, ("max", "topology"), allowed)


def _affinity(vm: "VmConfig") -> None:
    for vcpu in vm.cpus.affinity or ():
        if vcpu >= vm.cpus.max:
            allowed = f"there is no vCPU {vcpu}; they are 0 to {vm.cpus.max - 1}"
            raise at_odds("--cpus", vm.cpus, ("max", "affinity"), allowed)


def _memory_size(vm: "VmConfig") -> None:
    memory = vm.memory
    unit = _page_size(memory)
    least = max(MIN_MEMORY, unit)
    if memory.size < least:
        raise at_odds("--memory", memory, ("size",), f"size is at least {format_size(least)}")
    if memory.size % unit:
        keys = ("size", "hugepages") if memory.hugepages else ("size",)
        raise at_odds("--memory", memory, keys, f"size is a multiple of {format_size(unit)}")


def _huge_pages(vm: "VmConfig") -> None:
    memory = vm.memory
    if memory.hugepage_size is not None and not memory.hugepages:
        raise at_odds("--memory", memory, ("hugepage_size",), "hugepage_size needs hugepages=on")
    if memory.hugepage_size not in (None, *HUGE_PAGE_SIZES):
        sizes = " or ".join(map(format_size, HUGE_PAGE_SIZES))
        raise at_odds("--memory", memory, ("hugepage_size",), f"hugepage_size is {sizes}")


def _memory_origin(vm: "VmConfig") -> None:
    memory = vm.memory
    if memory.file is not None and memory.hugepages:
        allowed = "only one is possible; for huge pages in a file, name one on a hugetlbfs mount"
        raise at_odds("--memory", memory, ("file", "hugepages"), allowed)
    for key in ("shared", "hugepages"):
        if memory.mergeable and getattr(memory, key):
            allowed = "the host merges only small pages that are not shared"
            raise at_odds("--memory", memory, ("mergeable", key), allowed)
    if memory.mergeable and vm.has_backends:
        allowed = "a device of another process shares the memory, and the host merges only what is not shared"
        raise at_odds("--memory", memory, ("mergeable",), allowed)


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


def _balloon(vm: "VmConfig") -> None:
    if vm.balloon is not None and vm.balloon.size > vm.memory.size:
        allowed = f"the guest has {format_size(vm.memory.size)}"
        raise at_odds("--balloon", vm.balloon, ("size",), allowed)


def _nets(vm: "VmConfig") -> None:
    for net in vm.net:
        _net(net)
    for key in ("id", "mac", "tap"):
        given = [net for net in vm.net if getattr(net, key) is not None]
        for index, net in enumerate(given):
            if any(getattr(other, key) == getattr(net, key) for other in given[:index]):
                raise at_odds("--net", net, (key,), f"another interface has this {key} already")
    fds = [fd for net in vm.net for fd in net.fd or ()]
    for net in vm.net:
        if any(fds.count(fd) > 1 for fd in net.fd or ()):
            raise at_odds("--net", net, ("fd",), "another interface has one of them too")


def _net(net: "NetConfig") -> None:
    _vhost_user("--net", net, "tap", "ip", "mask", "host_mac", "mtu", "fd")
    if not net.vhost_user and net.vhost_mode != "client":
        raise at_odds("--net", net, ("vhost_mode",), "vhost_mode needs vhost_user=on")
    if net.num_queues % 2:
        raise at_odds("--net", net, ("num_queues",), "receive and transmit queues make an even number")
    if net.queue_size & (net.queue_size - 1):
        raise at_odds("--net", net, ("queue_size",), "a queue's size is a power of two")
    if net.fd is not None:
        if net.tap is not None:
            raise at_odds("--net", net, ("tap", "fd"), "one of tap and fd is enough")
        if 2 * len(net.fd) != net.num_queues:
            allowed = f"num_queues is twice the number of descriptors, {2 * len(net.fd)}"
            raise at_odds("--net", net, ("fd", "num_queues"), allowed)
        if net.fd[0] <= STDERR:
            raise at_odds("--net", net, ("fd",), "0 to 2 are standard input, output and error")
    if net.mask is not None and (":" in net.mask) != (":" in (net.ip or "")):
        raise at_odds("--net", net, ("ip", "mask"), "ip and mask are both of IPv4 or both of IPv6")


def _disks(vm: "VmConfig") -> None:
    for index, disk in enumerate(vm.disks):
        if disk.queue_size & (disk.queue_size - 1):
            raise at_odds("--disk", disk, ("queue_size",), "a queue's size is a power of two")
        _vhost_user("--disk", disk, "path", "readonly", "direct", "serial", "image_type")
        if not disk.vhost_user and disk.path is None:
            raise at_odds("--disk", disk, ("path",), "a path is required, or vhost_user=on with a socket")
        for other in vm.disks[:index]:
            if disk.id is not None and disk.id == other.id:
                raise at_odds("--disk", disk, ("id",), "another disk has this id already")
            if disk.path is not None and disk.path == other.path and not (disk.readonly and other.readonly):
                raise at_odds("--disk", disk, ("path",), "another disk is this image; both need readonly=on")


def _vhost_user(option: str, struct: "DiskConfig | NetConfig", *local: str) -> None:
    """A device of a back-end needs its socket, and nothing that is about a device of this process."""
    if struct.offload and struct.vhost_user:
        allowed = "a back-end of somebody else's has it already, or one of pileus shall; not both"
        raise at_odds(option, struct, ("vhost_user", "offload"), allowed)
    if struct.offload and struct.iommu:
        raise at_odds(option, struct, ("offload", "iommu"), "no back-end can be behind the virtual IOMMU")
    if not struct.vhost_user:
        if struct.socket is not None:
            raise at_odds(option, struct, ("socket",), "socket needs vhost_user=on")
        return
    if struct.socket is None:
        raise at_odds(option, struct, ("vhost_user",), "socket= is required")
    for key in local:
        if getattr(struct, key) not in (None, False):
            raise at_odds(option, struct, ("vhost_user", key), f"the back-end decides, so {key} has no place")
    if struct.iommu:
        raise at_odds(option, struct, ("vhost_user", "iommu"), "no back-end can be behind the virtual IOMMU")


def _vhost_user_devices(vm: "VmConfig") -> None:
    for net in vm.vhost_user_net:
        if net.num_queues % 2:
            allowed = "receive and transmit queues make an even number"
            raise at_odds("--vhost-user-net", net, ("num_queues",), allowed)
    named: tuple[tuple[str, Sequence[VhostUserNetConfig | VhostUserBlkConfig | FsConfig]], ...] = (
        ("--vhost-user-net", vm.vhost_user_net),
        ("--vhost-user-blk", vm.vhost_user_blk),
        ("--fs", vm.fs),
    )
    for option, devices in named:
        for device in devices:
            if device.queue_size & (device.queue_size - 1):
                raise at_odds(option, device, ("queue_size",), "a queue's size is a power of two")


def _shared_directories(vm: "VmConfig") -> None:
    for index, fs in enumerate(vm.fs):
        if (fs.sock is None) == (fs.socket is None):
            allowed = "sock= is required" if fs.sock is None else "one of sock and socket is enough"
            raise at_odds("--fs", fs, ("tag",) if fs.sock is None else ("sock", "socket"), allowed)
        if any(other.tag == fs.tag for other in vm.fs[:index]):
            raise at_odds("--fs", fs, ("tag",), "another directory has this tag already")
        if fs.cache_size is not None:
            if not fs.dax:
                raise at_odds("--fs", fs, ("dax", "cache_size"), "without dax there is no window to size")
            if fs.cache_size < PAGE_SIZE or fs.cache_size & (fs.cache_size - 1):
                raise at_odds("--fs", fs, ("cache_size",), "a power of two, at least 4K")


def _sockets(vm: "VmConfig") -> None:
    """A back-end has one front-end."""
    sockets: list[tuple[str, Struct, str, str]] = []
    sockets += [("--disk", disk, "socket", disk.socket) for disk in vm.disks if disk.socket]
    sockets += [("--net", net, "socket", net.socket) for net in vm.net if net.socket]
    sockets += [("--fs", fs, "sock" if fs.sock else "socket", fs.path) for fs in vm.fs]
    sockets += [("--vhost-user-net", net, "sock", net.sock) for net in vm.vhost_user_net]
    sockets += [("--vhost-user-blk", blk, "sock", blk.sock) for blk in vm.vhost_user_blk]
    sockets += [("--user-device", device, "socket", device.socket) for device in vm.user_devices]
    paths = [path for *_, path in sockets]
    for index, (option, struct, key, path) in enumerate(sockets):
        if path in paths[:index]:
            raise at_odds(option, struct, (key,), "another device has this socket already")


def _vsock(vm: "VmConfig") -> None:
    vsock = vm.vsock
    if vsock is None:
        return
    if len(vsock.socket.encode(errors="surrogatepass")) > SOCKET_PATH_LIMIT:
        allowed = f"socket is a path of at most {SOCKET_PATH_LIMIT} bytes, so that _PORT fits behind it"
        raise at_odds("--vsock", vsock, ("socket",), allowed)
    for option, terminal in (("--serial", vm.serial), ("--console", vm.console)):
        if vsock.socket == terminal.path:
            raise at_odds("--vsock", vsock, ("socket",), f"{option} has this path too; each needs its own")
    if vsock.id is not None and vsock.id in [*(net.id for net in vm.net), *(disk.id for disk in vm.disks)]:
        raise at_odds("--vsock", vsock, ("id",), "another device has this id already")


def _persistent_memory(vm: "VmConfig") -> None:
    if len(vm.pmem) > MAX_PMEM:
        raise ConfigError("--pmem", f"({len(vm.pmem)} of them)", f"at most {MAX_PMEM} are possible")
    ids = [*(disk.id for disk in vm.disks), *(net.id for net in vm.net), vm.vsock and vm.vsock.id]
    for index, pmem in enumerate(vm.pmem):
        if pmem.size is not None and (pmem.size == 0 or pmem.size % PMEM_UNIT):
            raise at_odds("--pmem", pmem, ("size",), f"size is a multiple of {format_size(PMEM_UNIT)}")
        if pmem.nvdimm and pmem.iommu:
            raise at_odds("--pmem", pmem, ("nvdimm", "iommu"), "an NVDIMM is no device behind an IOMMU")
        if pmem.id is not None and pmem.id in [*ids, *(other.id for other in vm.pmem[:index])]:
            raise at_odds("--pmem", pmem, ("id",), "another device has this id already")


def _pass_through(vm: "VmConfig") -> None:
    named: tuple[tuple[str, Sequence[DeviceConfig | UserDeviceConfig]], ...] = (
        ("--device", vm.devices),
        ("--user-device", vm.user_devices),
    )
    taken = [net.id for net in vm.net] + [disk.id for disk in vm.disks]
    for option, devices in named:
        for device in devices:
            if not vm.pci:
                key = "path" if option == "--device" else "socket"
                raise at_odds(option, device, (key,), "it is a PCI device, and --pci is off")
            if device.id is not None and device.id in taken:
                raise at_odds(option, device, ("id",), "another device has this id already")
            taken.append(device.id)
    for index, host in enumerate(vm.devices):
        if any(host.path.rstrip("/") == other.path.rstrip("/") for other in vm.devices[:index]):
            raise at_odds("--device", host, ("path",), "it is given twice")
    if vm.devices and vm.balloon is not None:
        allowed = "the host cannot have memory back while --device lets a device of the host reach all of it"
        raise at_odds("--balloon", vm.balloon, ("size",), allowed)


def _iommu(vm: "VmConfig") -> None:
    """There is no way to tell a guest without PCI which devices are behind what."""
    for option, struct in vm.iommu_choices:
        if struct.iommu and not vm.pci:
            raise at_odds(option, struct, ("iommu",), "the virtual IOMMU is a PCI device, and --pci is off")


def _page_size(memory: "MemoryConfig") -> int:
    """What the size is a multiple of: the least huge page where the host will choose."""
    return (memory.hugepage_size or HUGE_PAGE_SIZES[0]) if memory.hugepages else PAGE_SIZE


def at_odds(option: str, struct: "Struct", keys: tuple[str, ...], allowed: str) -> ConfigError:
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
    _disks,
    _balloon,
    _nets,
    _vhost_user_devices,
    _shared_directories,
    _sockets,
    _vsock,
    _persistent_memory,
    _pass_through,
    _iommu,
)

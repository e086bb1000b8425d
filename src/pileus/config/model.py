"""Every value that can be configured: the one declaration behind options, their help, errors and the API.

Fields are named as on the command line; ``wire`` is the API's name where it is another.
"""

import os

from pileus.config.declare import Struct, field
from pileus.config.kinds import (
    Address,
    Choice,
    Count,
    FileUrl,
    Interface,
    Mac,
    Many,
    Mapping,
    Mask,
    Nested,
    Path,
    Printable,
    Ranges,
    Size,
    Switch,
    Times,
    Tuple,
)
from pileus.config.units import GIB, MIB

MAX_VCPUS = 4096  # no x86 kernel allows more (<asm/kvm_host.h>); what a host allows is asked of KVM
MAX_HOST_CPUS = 8192  # CONFIG_NR_CPUS ends here
CMDLINE_LIMIT = 65536  # bytes with the NUL, what the layout sets aside
FD_MAX = (1 << 31) - 1
FD_LIMIT = 1 << 20  # one more than the highest that Linux allows by default (fs.nr_open)
MAX_PAIRS = 256  # queue pairs of a TAP (MAX_TAP_QUEUES)
MAX_QUEUE_SIZE = 32768  # virtio 1.2, 2.7
MIN_MTU, MAX_MTU = 68, 65521  # <linux/if_ether.h>, and what a TAP's driver allows
ID_LIMIT = 128
TAG_LIMIT = 37  # one more than virtio-fs has room for: virtio 1.2, 5.11.4
MAX_FS_QUEUES = 255  # what one byte of vhost-user can number, less the urgent queue

MAX_DISK_QUEUES = 256
MAX_DISK_QUEUE_SIZE = 1024  # a chain is no longer, and that is what one preadv takes
SERIAL_LIMIT = 21  # one more than there is room for: virtio 1.2, 5.2.6
MIN_CID, MAX_CID = 3, (1 << 32) - 2  # 0 to 2 and the last are taken: virtio 1.2, 5.10.4

PATH, SIZE, SWITCH = Path(), Size(), Switch()
FD = Count(0, FD_MAX)
VCPUS = Count(1, MAX_VCPUS)
TOPOLOGY = ("threads_per_core", "cores_per_die", "dies_per_package", "packages")
MODE = Choice("off", "null", "tty", "pty", "file", "socket")
MODE_HELP = "off is no device, null a silent one, tty the terminal of pileus, pty a new one"


class CpusConfig(Struct):
    """How many vCPUs there are and how they are arranged."""

    bare = "boot"

    boot: int = field(VCPUS, "vCPUs that run from the start", default=1, wire="boot_vcpus")
    max: int = field(
        VCPUS,
        "vCPUs that the guest can have at most",
        factory=lambda cpus: cpus.boot,
        default_help="as boot",
        wire="max_vcpus",
    )
    topology: tuple[int, int, int, int] | None = field(
        Tuple("threads", "cores", "dies", "packages", high=MAX_VCPUS, wire=TOPOLOGY),
        "threads per core, cores per die, dies per package, and packages; their product is max",
        default=None,
        default_help="one package with a core per vCPU",
    )
    max_phys_bits: int | None = field(
        Count(36, 52), "physical address bits that the guest sees", default=None, default_help="as the host"
    )
    affinity: dict[int, list[int]] | None = field(
        Mapping(Count(0, MAX_VCPUS - 1), Ranges(MAX_HOST_CPUS), wire=("vcpu", "host_cpus")),
        "host CPUs that a vCPU may run on, as in [0@[0-3],1@[2,4]]",
        default=None,
        default_help="any",
    )


class MemoryConfig(Struct):
    """How much RAM the guest has and what it is made of."""

    bare = "size"

    size: int = field(SIZE, "RAM of the guest", default=512 * MIB)
    file: str | None = field(
        PATH,
        "file that holds the RAM, or a directory (such as /dev/shm) for one without a name",
        default=None,
        default_help="memory of pileus",
    )
    shared: bool = field(SWITCH, "let vhost-user backends map the RAM", default=False)
    hugepages: bool = field(SWITCH, "take huge pages set aside by the host", default=False)
    hugepage_size: int | None = field(
        SIZE, "size of these huge pages, 2M or 1G", default=None, default_help="as the host"
    )
    prefault: bool = field(SWITCH, "take all memory at the start", default=False)
    thp: bool = field(SWITCH, "ask the host for transparent huge pages", default=True)
    mergeable: bool = field(SWITCH, "let the host merge equal pages (KSM)", default=False)


class PayloadConfig(Struct):
    """What the guest boots."""

    kernel: str | None = field(PATH, "kernel to boot: bzImage, or ELF (vmlinux, PVH, firmware)", default=None)
    cmdline: str = field(
        Printable(CMDLINE_LIMIT), "command line of the kernel", default="", default_help="empty"
    )
    initramfs: str | None = field(PATH, "initramfs for the kernel", default=None)


class SerialConfig(Struct):
    """Where a terminal of the guest is on the host."""

    bare = "mode"

    mode: str = field(MODE, MODE_HELP, default="null")
    file: str | None = field(
        PATH, "file for the output, emptied first; no input", default=None, implies=("mode", "file")
    )
    socket: str | None = field(
        PATH, "Unix socket to listen on, for one client at a time", default=None, implies=("mode", "socket")
    )

    @property
    def path(self) -> str | None:
        """The file or the socket, if the mode has one."""
        return self.file if self.mode == "file" else self.socket


class ConsoleConfig(SerialConfig):
    """Likewise, for the virtio console."""

    mode: str = field(MODE, MODE_HELP, default="tty")
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)


class RngConfig(Struct):
    """Where the guest's entropy comes from."""

    src: str = field(PATH, "file that entropy is read from", default="/dev/urandom")
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)


class NetConfig(Struct):
    """A network interface, and the TAP or macvtap of the host behind it."""

    tap: str | None = field(
        Interface(), "TAP or macvtap of the host", default=None, default_help="a new TAP, vmtapN"
    )
    ip: str | None = field(
        Address(),
        "the host's address on it",
        default=None,
        default_help="192.168.249.1 for a TAP that pileus makes",
    )
    mask: str | None = field(
        Mask(), "mask of that address", default=None, default_help="255.255.255.0, or 64 bits"
    )
    mac: str | None = field(
        Mac(), "the guest's MAC address", default=None, default_help="that of a macvtap, else a random one"
    )
    host_mac: str | None = field(
        Mac(), "the host's MAC address", default=None, default_help="chosen by the kernel"
    )
    vhost_user: bool = field(SWITCH, "a vhost-user back-end has the interface, not this host", default=False)
    socket: str | None = field(PATH, "Unix socket of the back-end", default=None, wire="vhost_socket")
    vhost_mode: str = field(
        Choice("client", "server"), "whether pileus connects to the socket or listens on it", default="client"
    )
    mtu: int | None = field(
        Count(MIN_MTU, MAX_MTU), "MTU of both sides", default=None, default_help="as it is on the host"
    )
    fd: list[int] | None = field(
        Ranges(FD_LIMIT),
        "inherited descriptors of a TAP instead, one per queue pair",
        default=None,
        wire="fds",
    )
    num_queues: int = field(
        Count(2, 2 * MAX_PAIRS),
        "receive and transmit queues together, so an even number",
        factory=lambda net: 2 * len(net.fd or (0,)),
        default_help="2, or two per fd",
    )
    queue_size: int = field(Count(2, MAX_QUEUE_SIZE), "descriptors of each, a power of two", default=256)
    id: str | None = field(Printable(ID_LIMIT), "name of the device", default=None, default_help="_netN")
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)
    offload: bool = field(SWITCH, "serve it by a process of its own", default=False)
    offload_csum: bool = field(SWITCH, "leave checksums, and so all offloads, to the host", default=True)
    offload_tso: bool = field(SWITCH, "let large TCP packets through whole", default=True)
    offload_ufo: bool = field(SWITCH, "let large UDP packets through whole", default=True)


class DiskConfig(Struct):
    """A disk, and the image of the host that holds it."""

    path: str | None = field(PATH, "image file or block device", default=None, default_help="none")
    vhost_user: bool = field(SWITCH, "a vhost-user back-end has the disk, not a file", default=False)
    socket: str | None = field(PATH, "Unix socket of the back-end", default=None, wire="vhost_socket")
    readonly: bool = field(SWITCH, "let the guest read only", default=False)
    direct: bool = field(SWITCH, "go around the host's page cache (O_DIRECT)", default=False)
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)
    num_queues: int = field(Count(1, MAX_DISK_QUEUES), "queues, each with a thread of its own", default=1)
    queue_size: int = field(Count(4, MAX_DISK_QUEUE_SIZE), "descriptors of each, a power of two", default=128)
    serial: str | None = field(
        Printable(SERIAL_LIMIT), "serial number that the guest sees", default=None, default_help="none"
    )
    id: str | None = field(Printable(ID_LIMIT), "name of the device", default=None, default_help="_diskN")
    offload: bool = field(SWITCH, "serve it by a process of its own", default=False)
    image_type: str | None = field(
        Choice("raw", "qcow2"),
        "format of the image; a raw one that is not said to be raw keeps its guest from writing the first"
        " bytes of another format",
        default=None,
        default_help="what it looks like",
    )


class BalloonConfig(Struct):
    """Memory that the guest is asked to give back."""

    size: int = field(SIZE, "how much, at first", default=0)
    deflate_on_oom: bool = field(
        SWITCH, "let the guest take it back rather than run out of memory", default=False
    )
    free_page_reporting: bool = field(
        SWITCH, "let the guest tell of pages that it does not use, for the host to have", default=False
    )
    statistics: bool = field(SWITCH, "let the guest tell how it uses its memory", default=False)


class FsConfig(Struct):
    """A directory that a vhost-user back-end such as virtiofsd shares with the guest."""

    tag: str = field(Printable(TAG_LIMIT), "what the guest mounts it by")
    sock: str | None = field(PATH, "Unix socket of the back-end", default=None)
    socket: str | None = field(PATH, "another name for sock", default=None)
    num_queues: int = field(Count(1, MAX_FS_QUEUES), "queues for requests, beside the urgent one", default=1)
    queue_size: int = field(
        Count(2, MAX_QUEUE_SIZE), "descriptors of each queue, a power of two", default=1024
    )
    dax: bool = field(SWITCH, "let the guest map files, if the back-end can", default=True)
    cache_size: int | None = field(
        SIZE,
        "size of that window, a power of two",
        factory=lambda fs: 8 * GIB if fs.dax else None,
        default_help="8G with dax",
    )

    @property
    def path(self) -> str:
        """The back-end's socket, whichever way it was named."""
        return self.sock or self.socket or ""


class VhostUserNetConfig(Struct):
    """A network interface that a vhost-user back-end has."""

    mac: str | None = field(Mac(), "the guest's MAC address", default=None, default_help="a random one")
    sock: str = field(PATH, "Unix socket of the back-end")
    num_queues: int = field(
        Count(2, 2 * MAX_PAIRS), "receive and transmit queues together, so an even number", default=2
    )
    queue_size: int = field(Count(2, MAX_QUEUE_SIZE), "descriptors of each, a power of two", default=256)


class VhostUserBlkConfig(Struct):
    """A disk that a vhost-user back-end has."""

    sock: str = field(PATH, "Unix socket of the back-end")
    num_queues: int = field(Count(1, MAX_DISK_QUEUES), "queues", default=1)
    queue_size: int = field(Count(4, MAX_DISK_QUEUE_SIZE), "descriptors of each, a power of two", default=128)
    wce: bool = field(SWITCH, "let the guest turn the write cache off and on", default=True)


class VsockConfig(Struct):
    """Sockets between the guest and Unix sockets of the host."""

    aliases = {"sock": "socket"}  # noqa: RUF012 - as Cloud Hypervisor 0.3 called it

    cid: int = field(Count(MIN_CID, MAX_CID), "the guest's number")
    socket: str = field(
        PATH, "Unix socket to make: write CONNECT PORT there; the guest's connections go to SOCKET_PORT"
    )
    id: str | None = field(Printable(ID_LIMIT), "name of the device", default=None, default_help="_vsock0")
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)


class PmemConfig(Struct):
    """Persistent memory: a file of the host that the guest has in its address space."""

    file: str = field(PATH, "file or block device, or a directory for a file without a name")
    size: int | None = field(
        SIZE, "how much of it, a multiple of 2M", default=None, default_help="all of the file"
    )
    discard_writes: bool = field(
        SWITCH, "keep what the guest writes from the file, until the VM ends", default=False
    )
    nvdimm: bool = field(
        SWITCH, "an NVDIMM that ACPI describes, instead of a device of virtio", default=False
    )
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)
    id: str | None = field(Printable(ID_LIMIT), "name of the device", default=None, default_help="_pmemN")


class DeviceConfig(Struct):
    """A PCI device of the host that the guest has to itself (VFIO)."""

    path: str = field(PATH, "the device, bound to vfio-pci: /sys/bus/pci/devices/DDDD:BB:SS.F")
    iommu: bool = field(SWITCH, "put the device behind the virtual IOMMU", default=False)
    id: str | None = field(Printable(ID_LIMIT), "name of the device", default=None, default_help="_vfioN")


class UserDeviceConfig(Struct):
    """A PCI device that another process emulates (vfio-user)."""

    socket: str = field(PATH, "Unix socket that its server listens on")
    id: str | None = field(
        Printable(ID_LIMIT), "name of the device", default=None, default_help="_vfio_userN"
    )


BehindIommu = (
    ConsoleConfig | RngConfig | NetConfig | DiskConfig | VsockConfig | PmemConfig | DeviceConfig
)  # what can be


class VmConfig(Struct):
    """A virtual machine."""

    cpus: CpusConfig = field(Nested(CpusConfig), "vCPUs", factory=lambda _: CpusConfig())
    memory: MemoryConfig = field(Nested(MemoryConfig), "RAM", factory=lambda _: MemoryConfig())
    payload: PayloadConfig = field(Nested(PayloadConfig), "what to boot", factory=lambda _: PayloadConfig())
    pci: bool = field(
        SWITCH, "carry virtio devices on PCI; off: on virtio-mmio, for guests without PCI", default=True
    )
    irqchip: str | None = field(
        Choice("kernel", "split"),
        "who has the IOAPIC: kernel is KVM, with 8259s; split is pileus, and KVM has the local APICs only",
        default=None,
        default_help="kernel, or split where APIC ids pass 254",
    )
    disks: list[DiskConfig] = field(Many(DiskConfig), "disks", factory=lambda _: [])
    serial: SerialConfig = field(Nested(SerialConfig), "serial port", factory=lambda _: SerialConfig())
    console: ConsoleConfig = field(
        Nested(ConsoleConfig),
        "virtio console; off by itself where --serial is tty",
        factory=lambda vm: ConsoleConfig(mode="off" if vm.serial.mode == "tty" else "tty"),
    )
    rng: RngConfig = field(Nested(RngConfig), "entropy device", factory=lambda _: RngConfig())
    balloon: BalloonConfig | None = field(
        Nested(BalloonConfig), "memory balloon", default=None, default_help="none"
    )
    net: list[NetConfig] = field(Many(NetConfig), "network interfaces", factory=lambda _: [])
    fs: list[FsConfig] = field(Many(FsConfig), "directories shared with the guest", factory=lambda _: [])
    vhost_user_net: list[VhostUserNetConfig] = field(
        Many(VhostUserNetConfig), "network interfaces of vhost-user back-ends", factory=lambda _: []
    )
    vhost_user_blk: list[VhostUserBlkConfig] = field(
        Many(VhostUserBlkConfig), "disks of vhost-user back-ends", factory=lambda _: []
    )
    vsock: VsockConfig | None = field(Nested(VsockConfig), "sockets between guest and host", default=None)
    pmem: list[PmemConfig] = field(Many(PmemConfig), "persistent memory", factory=lambda _: [])

    devices: list[DeviceConfig] = field(
        Many(DeviceConfig), "PCI devices of the host to pass through", factory=lambda _: []
    )
    user_devices: list[UserDeviceConfig] = field(
        Many(UserDeviceConfig), "PCI devices that other processes emulate", factory=lambda _: []
    )

    @property
    def has_backends(self) -> bool:
        """Whether another process serves one of the devices, and so needs the guest's memory."""
        if self.fs or self.vhost_user_net or self.vhost_user_blk or self.user_devices:
            return True
        devices: list[DiskConfig | NetConfig] = [*self.disks, *self.net]
        return any(device.vhost_user or device.offload for device in devices)

    @property
    def has_offloaded(self) -> bool:
        """Whether a device is to have a process of its own, which pileus starts."""
        return any(disk.offload for disk in self.disks) or any(net.offload for net in self.net)

    @property
    def has_iommu(self) -> bool:
        """Whether a device is to be behind the virtual IOMMU, and so whether there is one."""
        return any(struct.iommu for _, struct in self.iommu_choices)

    @property
    def iommu_choices(self) -> "list[tuple[str, BehindIommu]]":
        """All that can be behind the virtual IOMMU, with their options."""
        console = [] if self.console.mode == "off" else [("--console", self.console)]
        vsock = [] if self.vsock is None else [("--vsock", self.vsock)]
        disks = [("--disk", disk) for disk in self.disks]
        nets = [("--net", net) for net in self.net]
        pmem = [("--pmem", pmem) for pmem in self.pmem]
        devices = [("--device", device) for device in self.devices]
        return [*console, *disks, *nets, ("--rng", self.rng), *vsock, *pmem, *devices]


class CoredumpConfig(Struct):
    """Where a core of the VM goes."""

    path: str = field(FileUrl(), "a new file", wire="destination_url")


class ApiSocketConfig(Struct):
    """Where the API listens: at a path, or on a socket that listens already."""

    bare = "path"

    path: str | None = field(
        PATH, "Unix socket to make", default=None, default_help="pileus.PID in /run/user/UID or /run"
    )
    fd: int | None = field(FD, "number of an inherited socket, listening already", default=None)

    @property
    def where(self) -> str:
        """The path given, or the default: in the run-time directory of the user, also of one behind sudo."""
        user = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else str(os.geteuid())
        folder = f"/run/user/{user}" if user.isdecimal() else "/run"
        return self.path or f"{folder}/pileus.{os.getpid()}"


class EventMonitorConfig(Struct):
    """Where events are written to, as JSON."""

    path: str | None = field(PATH, "file, emptied first, or FIFO", default=None)
    fd: int | None = field(FD, "number of an inherited descriptor", default=None)


class VmmConfig(Struct):
    """The whole of a pileus process."""

    vm: VmConfig | None = field(Nested(VmConfig), "the VM to boot", default=None)
    api_socket: ApiSocketConfig | None = field(
        Nested(ApiSocketConfig),
        "where the HTTP API listens; without --kernel it always does",
        default=None,
    )
    event_monitor: EventMonitorConfig | None = field(
        Nested(EventMonitorConfig), "what tells of events", default=None
    )
    seccomp: str = field(
        Choice("true", "false", "log", "errno"),
        "accepted for the programs that pass it; no filter is in force yet",
        default="true",
    )
    log_file: str | None = field(
        PATH, "file for messages, emptied first", default=None, default_help="standard error"
    )
    verbosity: int = field(
        Times(), "warnings too; again: info, debug, trace", default=0, default_help="errors only"
    )

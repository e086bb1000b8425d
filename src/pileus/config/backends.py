"""What the back-ends' commands take, as ``model`` has it for ``pileus``."""

from pileus.config.check import SOCKET_LIMIT, at_odds
from pileus.config.declare import Struct, field
from pileus.config.kinds import (
    Address,
    Choice,
    Count,
    Interface,
    Mac,
    Mask,
    Nested,
    Path,
    Printable,
    Ranges,
    Times,
    Tuple,
)
from pileus.config.model import (
    FD,
    FD_LIMIT,
    ID_LIMIT,
    MAX_DISK_QUEUE_SIZE,
    MAX_DISK_QUEUES,
    MAX_FS_QUEUES,
    MAX_MTU,
    MAX_PAIRS,
    MAX_QUEUE_SIZE,
    MIN_MTU,
    PATH,
    SERIAL_LIMIT,
    SIZE,
    SWITCH,
    TAG_LIMIT,
)
from pileus.errors import ConfigError

GIB = 1 << 30
PAGE = 4096
MAX_ID = (1 << 32) - 2
SOCK = field(PATH, "Unix socket to listen on, as --socket", default=None, default_help="none")
ID = field(Printable(ID_LIMIT), "name of the device in messages", default=None, default_help="the command's")


class DiskBackendConfig(Struct):
    """The image that is served."""

    path: str | None = field(PATH, "image file or block device", default=None, default_help="none")
    fd: int | None = field(FD, "inherited descriptor of it, which path merely names then", default=None)
    sock: str | None = field(PATH, "Unix socket to listen on, as --socket", default=None)
    readonly: bool = field(SWITCH, "let the guest read only", default=False)
    direct: bool = field(SWITCH, "go around the host's page cache (O_DIRECT)", default=False)
    num_queues: int = field(
        Count(1, MAX_DISK_QUEUES), "queues at most, each with a thread of its own", default=1
    )
    queue_size: int = field(
        Count(4, MAX_DISK_QUEUE_SIZE), "descriptors of each at most, a power of two", default=256
    )
    wce: bool = field(SWITCH, "let the guest turn the write cache off and on", default=True)
    serial: str | None = field(
        Printable(SERIAL_LIMIT), "serial number that the guest sees", default=None, default_help="none"
    )
    image_type: str | None = field(
        Choice("raw", "qcow2"), "format of the image", default=None, default_help="what it looks like"
    )
    id: str | None = field(Printable(ID_LIMIT), "name in messages", default=None, default_help="pileus-blk")


class NetBackendConfig(Struct):
    """The TAP that is served."""

    tap: str | None = field(Interface(), "TAP of the host", default=None, default_help="a new one, vmtapN")
    fd: list[int] | None = field(
        Ranges(FD_LIMIT), "inherited descriptors of a TAP instead, one per queue pair", default=None
    )
    ip: str | None = field(
        Address(), "the host's address on it", default=None, default_help="192.168.100.1 for a new TAP"
    )
    mask: str | None = field(
        Mask(), "mask of that address", default=None, default_help="255.255.255.0, or 64 bits"
    )
    host_mac: str | None = field(
        Mac(), "the host's MAC address", default=None, default_help="chosen by the kernel"
    )
    mtu: int | None = field(
        Count(MIN_MTU, MAX_MTU), "MTU of the host's side", default=None, default_help="as it is"
    )
    sock: str | None = field(PATH, "Unix socket to listen on, as --socket", default=None)
    num_queues: int = field(
        Count(2, 2 * MAX_PAIRS),
        "receive and transmit queues together at most, so an even number",
        factory=lambda net: 2 * len(net.fd or (0,)),
        default_help="2, or two per fd",
    )
    queue_size: int = field(
        Count(2, MAX_QUEUE_SIZE), "descriptors of each at most, a power of two", default=1024
    )
    offload_csum: bool = field(SWITCH, "leave checksums, and so all offloads, to the host", default=True)
    offload_tso: bool = field(SWITCH, "let large TCP packets through whole", default=True)
    offload_ufo: bool = field(SWITCH, "let large UDP packets through whole", default=True)
    id: str | None = field(Printable(ID_LIMIT), "name in messages", default=None, default_help="pileus-net")


class DirectoryBackendConfig(Struct):
    """The directory that is shared."""

    path: str | None = field(PATH, "directory to share", default=None, default_help="none")
    sock: str | None = field(PATH, "Unix socket to listen on, as --socket", default=None)
    tag: str = field(
        Printable(TAG_LIMIT), "what guests mount it by, where the front-end does not say", default=""
    )
    readonly: bool = field(SWITCH, "let the guest read only", default=False)
    cache: str = field(
        Choice("auto", "always", "never"),
        "how long guests believe what they know: a second, a day",
        default="auto",
    )
    cache_size: int = field(
        SIZE, "window for guests to map files in (DAX), a power of two", default=8 * GIB, default_help="8G"
    )
    xattr: bool = field(SWITCH, "extended attributes: user.*, and capabilities of programs", default=True)
    locks: bool = field(SWITCH, "locks hold on this host too, not in each guest by itself", default=False)
    uid_map: tuple[int, ...] | None = field(
        Tuple("guest", "host", "count", low=0, high=MAX_ID),
        "users of the guest from GUEST on are those from HOST on here, COUNT of them",
        default=None,
        default_help="the same",
    )
    gid_map: tuple[int, ...] | None = field(
        Tuple("guest", "host", "count", low=0, high=MAX_ID),
        "likewise for groups",
        default=None,
        default_help="the same",
    )
    num_queues: int = field(
        Count(1, MAX_FS_QUEUES), "queues for requests at most, beside the urgent one", default=1
    )
    queue_size: int = field(
        Count(4, MAX_QUEUE_SIZE), "descriptors of each at most, a power of two", default=1024
    )
    id: str | None = field(Printable(ID_LIMIT), "name in messages", default=None, default_help="pileus-fs")


class BackendConfig(Struct):
    """What all back-ends take: where their front-ends are."""

    socket: str | None = field(Path(), "Unix socket to listen on", default=None)
    fd: int | None = field(FD, "inherited socket instead: one that listens, or a connection", default=None)
    log_file: str | None = field(
        PATH, "file for messages, emptied first", default=None, default_help="standard error"
    )
    verbosity: int = field(
        Times(), "warnings too; again: info, debug, trace", default=0, default_help="errors only"
    )


class BlkBackendConfig(BackendConfig):
    """The whole of a pileus-blk process."""

    backend: DiskBackendConfig = field(Nested(DiskBackendConfig), "the disk")


class TapBackendConfig(BackendConfig):
    """The whole of a pileus-net process."""

    backend: NetBackendConfig = field(
        Nested(NetBackendConfig), "the interface", factory=lambda _: NetBackendConfig()
    )


class FsBackendConfig(BackendConfig):
    """The whole of a pileus-fs process."""

    backend: DirectoryBackendConfig = field(Nested(DirectoryBackendConfig), "the directory")


def check(config: "BlkBackendConfig | TapBackendConfig | FsBackendConfig") -> None:
    """Judge all that spans fields. Raises ConfigError for the first rule that is broken."""
    backend = config.backend
    ways = {"--socket": config.socket, "--fd": config.fd, "--backend sock": backend.sock}
    given = {option: value for option, value in ways.items() if value is not None}
    if len(given) != 1:
        if not given:
            raise ConfigError("--socket", "is missing", "front-ends need a socket to come by, or --fd")
        option, value = given.popitem()
        raise ConfigError(option, value, "one of --socket, --fd and sock is enough")
    path = config.socket or backend.sock
    if path is not None and len(path.encode(errors="surrogatepass")) > SOCKET_LIMIT:
        raise ConfigError(next(iter(given)), path, f"a socket's path has at most {SOCKET_LIMIT} bytes")
    if backend.queue_size & (backend.queue_size - 1):
        raise at_odds("--backend", backend, ("queue_size",), "queue_size is a power of two")
    if isinstance(backend, DiskBackendConfig):
        if backend.path is None and backend.fd is None:
            raise at_odds("--backend", backend, (), "path= is required, or fd=")
    elif isinstance(backend, DirectoryBackendConfig):
        if backend.path is None:
            raise at_odds("--backend", backend, (), "path= is required")
        if backend.cache_size < PAGE or backend.cache_size & (backend.cache_size - 1):
            raise at_odds("--backend", backend, ("cache_size",), "cache_size is a power of two from 4K on")
    elif backend.num_queues % 2:
        raise at_odds("--backend", backend, ("num_queues",), "num_queues is an even number")
    elif backend.fd is not None and backend.tap is not None:
        raise at_odds("--backend", backend, ("tap", "fd"), "one of tap and fd is enough")
    elif backend.fd is not None and backend.num_queues != 2 * len(backend.fd):
        raise at_odds("--backend", backend, ("fd", "num_queues"), "each fd is two queues")

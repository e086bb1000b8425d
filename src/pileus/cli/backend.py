"""The commands ``pileus-blk``, ``pileus-net`` and ``pileus-fs``: one virtio device, served over vhost-user.

Exit status 0 after an orderly end (SIGTERM, or a front-end that leaves the one connection there is), 1 with
one sentence on standard error for whatever cannot be done, 128 + N for another signal N.

Source: vhost-user specification, Backend program conventions
"""

import sys

from pileus import __version__, log
from pileus.cli.args import build, scan
from pileus.cli.main import SIGINT, STDERR, STDOUT, say, start_log
from pileus.cli.options import COUNT, HELP, SINGLE, SWITCH, VERSION, Option
from pileus.config.backends import BlkBackendConfig, FsBackendConfig, TapBackendConfig, check
from pileus.errors import ConfigError, PileusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.vhost_user.connection import Client, Inherited, Server
    from pileus.virtio.device import VirtioDevice

    Config = BlkBackendConfig | TapBackendConfig | FsBackendConfig

SIGHUP, SIGTERM = 1, 15
FILES_OF_A_QUEUE, FILES = 8, 256  # descriptors, at most, of each queue and of all else
MANY_FILES = 1 << 20  # a descriptor for each inode that a guest knows
# Capabilities of who makes and reads files for others: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP.
FILE_SERVER = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31
CLIENT = Option("--client", "", SWITCH, help="connect to the socket, on which a front-end listens")
CAPABILITIES = Option("--print-capabilities", "", SWITCH, help="print what management software asks, as JSON")


def _groups(alias: str) -> "dict[str, tuple[Option, ...]]":
    return {
        "Device": (Option("--backend", "backend", SINGLE, alias),),
        "Front-end": (
            Option("--socket", "socket", SINGLE, "--socket-path"),
            Option("--fd", "fd"),
            CLIENT,
        ),
        "This process": (
            Option("--log-file", "log_file"),
            Option("-v", "verbosity", COUNT),
            CAPABILITIES,
            HELP,
            VERSION,
        ),
    }


class Command:
    """One of the commands: what it takes, and what it serves."""

    def __init__(
        self,
        name: str,
        about: str,
        alias: str,
        root: "type[Config]",
        capabilities: str,
        open: "Callable[[Config], VirtioDevice]",
        *,
        keeps: int = 0,
        files: int = 0,
    ) -> None:
        """``keeps`` are capabilities that it works with; ``files`` the descriptors that it wants."""
        self.name = name
        self.groups = _groups(alias)
        self.options = tuple(option for group in self.groups.values() for option in group)
        self._about = about
        self._root = root
        self._capabilities = capabilities
        self._open = open
        self._keeps = keeps
        self._files = files

    def main(self, arguments: "list[str] | None" = None) -> int:
        """Run it with ``arguments`` (default: the process's); return its exit status."""
        try:
            return self._run(sys.argv[1:] if arguments is None else arguments)
        except PileusError as error:
            say(STDERR, f"{self.name}: {log.one_line(str(error))}\n")
            return 1
        except KeyboardInterrupt:
            return 128 + SIGINT

    def configure(self, given: "dict[str, list[str]]") -> "Config":
        """The configuration that the options ask for, checked. Raises ConfigError."""
        if self._root is not TapBackendConfig and "--backend" not in given:
            kind = "an image" if self._root is BlkBackendConfig else "a directory"
            raise ConfigError("--backend", "is missing", f"path= of {kind} is needed")
        config = build(self._root, self.options, given)
        check(config)
        if CLIENT.flag in given and config.fd is not None:
            raise ConfigError("--client", "with --fd", "an inherited socket says by itself what it is")
        return config

    def _run(self, arguments: "list[str]") -> int:
        given = scan(arguments, self.options)
        if HELP.flag in given:
            from pileus.cli.help import usage

            head = f"{self.name} {__version__}: {self._about}\n\n"
            head += f"Usage: {self.name} --socket PATH [OPTION [VALUE]]...\n"
            return say(STDOUT, usage(self.groups, self._root, head))
        if VERSION.flag in given:
            return say(STDOUT, f"{self.name} {__version__}\n")
        if CAPABILITIES.flag in given:
            return say(STDOUT, self._capabilities + "\n")
        config = self.configure(given)
        start_log(config.log_file, config.verbosity)
        _allow_files(max(self._files, FILES + FILES_OF_A_QUEUE * config.backend.num_queues))
        device = self._open(config)
        try:
            return _serve(device, config, CLIENT.flag in given, self._keeps)
        finally:
            device.close()


def _serve(device: "VirtioDevice", config: "Config", as_client: bool, keeps: int) -> int:
    from pileus.cleanup import Cleanup
    from pileus.loop import READABLE, Loop
    from pileus.vhost_user import _privileges
    from pileus.vhost_user.server import BackendServer
    from pileus.vmm._signals import SignalFd

    cleanup = Cleanup()
    ended: list[int] = []
    try:
        loop = cleanup.own(Loop())
        signals = cleanup.own(SignalFd((SIGHUP, SIGINT, SIGTERM)))
        peer = cleanup.own(_peer(config, as_client))
        _privileges.drop(keeps)

        def signalled(_events: int) -> None:
            ended.extend(signals.take())
            loop.stop()

        loop.watch(signals.fd, READABLE, signalled)
        cleanup.own(BackendServer(device, peer, loop, loop.stop))
        loop.run()
    finally:
        cleanup.close()
    others = [number for number in ended if number != SIGTERM]
    return 128 + others[0] if others else 0


def _peer(config: "Config", as_client: bool) -> "Client | Inherited | Server":
    from pileus.vhost_user.connection import Client, Inherited, Server

    if config.fd is not None:
        return Inherited(config.fd)
    path = config.socket or config.backend.sock or ""
    return Client(path) if as_client else Server(path)


def _allow_files(wanted: int) -> None:
    """Let the process have so many descriptors, or as many as the host does."""
    if wanted > 1024:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _open_disk(config: "Config") -> "VirtioDevice":
    assert isinstance(config, BlkBackendConfig)
    from pileus.vhost_user.backends.blk import open_disk

    return open_disk(config.backend)


def _open_interface(config: "Config") -> "VirtioDevice":
    assert isinstance(config, TapBackendConfig)
    from pileus.vhost_user.backends.net import open_interface

    return open_interface(config.backend)


def _open_directory(config: "Config") -> "VirtioDevice":
    assert isinstance(config, FsBackendConfig)
    from pileus.vhost_user.backends.fs import open_directory

    return open_directory(config.backend)


BLK = Command(
    "pileus-blk",
    "a disk image, served as a virtio disk over vhost-user",
    "--block-backend",
    BlkBackendConfig,
    '{"type": "block", "features": []}',
    _open_disk,
)
NET = Command(
    "pileus-net",
    "a TAP, served as a virtio network interface over vhost-user",
    "--net-backend",
    TapBackendConfig,
    '{"type": "net"}',
    _open_interface,
)
FS = Command(
    "pileus-fs",
    "a directory, served as a virtio file system over vhost-user",
    "--shared-dir",
    FsBackendConfig,
    '{"type": "fs", "features": ["read-only"]}',
    _open_directory,
    keeps=FILE_SERVER,
    files=MANY_FILES,
)
COMMANDS = {command.name: command for command in (BLK, NET, FS)}

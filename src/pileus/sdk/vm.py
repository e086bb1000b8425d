"""A virtual machine as a context manager: it runs while the block does, and nothing of it is left behind."""

import os
import select
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from pileus.cleanup import Cleanup
from pileus.config.model import VmConfig, VsockConfig
from pileus.errors import ApiError, ConfigError, HostError, StateError
from pileus.kvm.probe import check_host
from pileus.listener import Listener
from pileus.sdk.client import Client, Info
from pileus.sdk.configure import configure
from pileus.sdk.host import ChildHost, ThreadHost
from pileus.sdk.ports import Vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.virtio.device import VirtioDevice

CID = 3  # of a guest that was given none; its own, so that all guests may have the same
OFF = ("Shutdown", "Created")
NO_VM = 404
SHORT = 60  # bytes of a folder's path, so that sockets in it have short enough ones
CHUNK = 1 << 16


class VirtualMachine:
    """A VM of this program. ``with`` starts it, and ends it without asking the guest; so do start and close.

    The words are those of the configuration (``pileus.config.model.VmConfig``), see ``sdk.configure``; there
    is a vsock unless ``vsock`` is False. The VM runs in a child process, or with ``in_process`` on threads of
    this one; ``devices`` then make devices of this program's own, anew for each boot. Without ``boot`` it
    waits for ``boot()``. Raises ConfigError for values that make no VM, before anything of the host is taken.
    """

    def __init__(
        self,
        *,
        kernel: str | os.PathLike[str] | None = None,
        cmdline: str | None = None,
        initramfs: str | os.PathLike[str] | None = None,
        cpus: Any = None,
        memory: Any = None,
        disks: Iterable[Any] | None = None,
        net: Iterable[Any] | None = None,
        fs: Iterable[Any] | None = None,
        serial: Any = None,
        console: Any = None,
        rng: Any = None,
        balloon: Any = None,
        vsock: Any = True,
        boot: bool = True,
        in_process: bool = False,
        devices: "Sequence[Callable[[], VirtioDevice]]" = (),
        **more: Any,
    ) -> None:
        named = {
            "kernel": kernel, "cmdline": cmdline, "initramfs": initramfs, "cpus": cpus, "memory": memory,
            "disks": disks, "net": net, "fs": fs, "serial": serial, "console": console, "rng": rng,
            "balloon": balloon,
        }  # fmt: skip
        self._own_vsock = vsock is True
        given = None if vsock is True or vsock is False else vsock
        self.config: VmConfig = configure(**named, **more, vsock=given)
        if self.config.payload.kernel is None:
            raise ConfigError("kernel", "is missing", "a VM needs one to boot")
        if devices and not in_process:
            raise ConfigError("devices", f"{len(devices)} of them", "a child process has none of our objects")
        self._boots = boot
        self._in_process = in_process
        self._devices = devices
        self._cleanup = Cleanup()
        self._owner = os.getpid()
        weakref.finalize(self, _close, self._cleanup, self._owner)  # if nobody closes it
        self._host: ChildHost | ThreadHost | None = None
        self._client: Client | None = None
        self._vsock: Vsock | None = None
        self._events_fd = -1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the VMM, and boot the VM unless that is to wait. Raises PileusError, and nothing is left."""
        if self._host is not None:
            raise StateError("start", "started", "it can be once")
        check_host()
        try:
            self._open()
            self.client.create(self.config)
            if self._boots:
                self.client.boot()
        except HostError as error:
            self.close()
            if self._host is None:
                raise
            raise HostError("start", "the VM", self._host.fate) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End VM and VMM, and remove all that they made. Harmless a second time, and in a fork."""
        _close(self._cleanup, self._owner)
        self._client = self._vsock = None

    # -- what can be asked of it ---------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """All that the API can do. ``client.path`` is its socket, for others while the VM is there."""
        if self._client is None:
            raise StateError("ask", "not started", "use it in a with statement, or start it")
        return self._client

    @property
    def vsock(self) -> Vsock:
        """Sockets to and from the guest's ports."""
        if self._vsock is None:
            reason = "it has to be started" if self._client is None else "it was made without"
            raise StateError("open sockets to", "without vsock", reason)
        return self._vsock

    @property
    def info(self) -> Info:
        return self.client.info()

    @property
    def state(self) -> str:
        """Created, Running, Paused or Shutdown."""
        return self.client.info().state

    def boot(self) -> None:
        """Boot it, the first time or again."""
        self.client.boot()

    def pause(self) -> None:
        """Stop it; nobody touches its memory once this returns."""
        self.client.pause()

    def resume(self) -> None:
        """Let it go on."""
        self.client.resume()

    def reboot(self) -> None:
        """End it without asking the guest, and boot it again."""
        self.client.reboot()

    def shutdown(self) -> None:
        """End it without asking the guest."""
        self.client.shutdown()

    def power_button(self) -> None:
        """Ask the guest to shut down; ``wait`` for it."""
        self.client.power_button()

    def nmi(self) -> None:
        """An NMI to each vCPU."""
        self.client.nmi()

    def counters(self) -> dict[str, dict[str, int]]:
        """What the devices have counted, by their names."""
        return self.client.counters()

    def coredump(self, path: str | os.PathLike[str]) -> None:
        """Write a core to a new file, for gdb or drgn; a VM that runs is paused meanwhile."""
        self.client.coredump(path)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the guest has powered off, or who else has ended the VM.

        Raises TimeoutError after ``timeout`` seconds, and HostError where pileus itself has ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._events_fd, select.POLLIN)
        while self._is_on():
            left = None if deadline is None else 1000 * (deadline - time.monotonic())
            if (left is not None and left <= 0) or not poll.poll(left):
                raise TimeoutError(f"the VM still runs after {timeout:g} s")
            os.read(self._events_fd, CHUNK)  # what happened, the next look at the state tells

    # -- how ---------------------------------------------------------------------------------------

    def _is_on(self) -> bool:
        try:
            return self.state not in OFF
        except ApiError as error:
            if error.status != NO_VM:
                raise
            return False
        except HostError as error:
            raise HostError("ask", "the VM", self._fate() or str(error)) from error

    def _open(self) -> None:
        own = self._cleanup
        folder = _new_folder()
        own.call(lambda: shutil.rmtree(folder, ignore_errors=True))
        config = self.config
        if self._own_vsock:
            config.vsock = VsockConfig(cid=CID, socket=os.path.join(folder, "vsock"))
        api = own.own(Listener(os.path.join(folder, "api"), backlog=128))
        self._events_fd, events = os.pipe()
        own.call(lambda fd=self._events_fd: os.close(fd))  # type: ignore[misc]
        lifeline, other = socket.socketpair()
        try:
            host = self._new_host(folder, api.socket, events, other)
        except BaseException:
            lifeline.close()
            raise
        self._host = host
        own.call(host.end)
        own.call(lifeline.close)
        self._client = Client(api.path)
        if config.vsock is not None:
            self._vsock = own.own(Vsock(config.vsock.socket, lambda: host.is_alive))

    def _new_host(
        self, folder: str, api: socket.socket, events_fd: int, lifeline: socket.socket
    ) -> ChildHost | ThreadHost:
        if self._in_process:
            return ThreadHost(api, events_fd, lifeline, self._devices)
        return ChildHost(folder, api, events_fd, lifeline)

    def _fate(self) -> str:
        """How the VMM ended, if it did."""
        return "" if self._host is None or self._host.is_alive else self._host.fate


def _close(cleanup: Cleanup, owner: int) -> None:
    if os.getpid() == owner:  # a fork that ends has no say
        cleanup.close()


def _new_folder() -> str:
    """A folder of this user's alone, with a short path."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="pileus-", dir=base if len(os.fsencode(base)) <= SHORT else "/tmp")

"""Where the VMM of a ``VirtualMachine`` runs: a child process, or a thread of this one.

Both get the listening API socket, the end of a pipe that events go to, and one end of the lifeline.
"""

import _thread
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from pileus.errors import HostError, PileusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.virtio.device import VirtioDevice

PATIENCE = 10.0  # seconds for a child to end by itself
SCRIPT = "import sys; sys.path[:0] = sys.argv[1:2]; from pileus.sdk.lead import child; child(*sys.argv[2:])"
SOURCES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

More = Sequence[Callable[[], "VirtioDevice"]]


class ChildHost:
    """A process of its own, which a program's Ctrl-C does not reach."""

    def __init__(self, folder: str, api: socket.socket, events_fd: int, lifeline: socket.socket) -> None:
        fds = (api.fileno(), events_fd, lifeline.fileno())
        words = [sys.executable, "-P", "-c", SCRIPT, SOURCES, folder, *map(str, fds)]
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=fds, process_group=0
            )
        except OSError as error:
            raise HostError("start", sys.executable, error) from error
        finally:
            api.close()
            os.close(events_fd)
            lifeline.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Wait for its end, the lifeline being cut; one that does not is killed."""
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def fate(self) -> str:
        """How it ended, in words."""
        return f"the process of pileus ended with status {self._process.wait()}"


class ThreadHost:
    """A thread of this process: the VM shares its memory, and ``more`` devices may be its objects."""

    def __init__(self, api: socket.socket, events_fd: int, lifeline: socket.socket, more: More) -> None:
        self._error: BaseException | None = None
        fds = (api.detach(), events_fd, lifeline.detach())
        self._thread = threading.Thread(target=self._main, args=(fds, more), name="vmm", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self._thread.join()

    @property
    def fate(self) -> str:
        self._thread.join()
        return "pileus ended" if self._error is None else str(self._error)

    def _main(self, fds: tuple[int, int, int], more: More) -> None:
        with open(f"/proc/self/task/{_thread.get_native_id()}/comm", "w") as comm:
            comm.write("vmm")
        from pileus.sdk.lead import lead

        try:
            lead(*fds, more, signals=False)
        except PileusError as error:
            self._error = error

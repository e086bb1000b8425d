"""The VMM that serves one ``VirtualMachine``, in a process or a thread of its own.

It waits for what comes by its API until its lifeline ends: when the other end closes, also because its holder
was killed, the VMM deletes its VM and ends.
"""

import os
import sys

from pileus.api.serve import serve
from pileus.config.model import ApiSocketConfig, EventMonitorConfig, VmmConfig
from pileus.errors import PileusError
from pileus.vmm.control import Control, shutdown
from pileus.vmm.loop import READABLE
from pileus.vmm.vmm import Vmm, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pileus.cleanup import Closeable
    from pileus.virtio.device import VirtioDevice

    More = Sequence[Callable[[], VirtioDevice]]


def lead(api_fd: int, events_fd: int, lifeline_fd: int, more: "More" = (), *, signals: bool) -> int:
    """Be the VMM until the lifeline ends; takes all three descriptors over. Returns the exit status."""
    api = ApiSocketConfig(fd=api_fd)
    served: list[int] = []

    def begin(vmm: Vmm) -> None:
        vmm.more_devices = more
        vmm.loop.watch(lifeline_fd, READABLE, lambda _: shutdown(vmm))

    def open_api(control: Control) -> "Closeable":
        control.submit(begin, lambda _: None)  # clients' calls queue up behind it
        server = serve(api, control)
        served.append(api_fd)
        return server

    try:
        config = VmmConfig(api_socket=api, event_monitor=EventMonitorConfig(fd=events_fd))
        return run(config, open_api, signals=signals)
    finally:
        os.close(lifeline_fd)
        if not served:
            os.close(api_fd)  # or clients would wait at it for ever


def child(folder: str, *fds: str) -> None:
    """The whole of a child process. It also removes ``folder``, which its parent cannot if it was killed."""
    status = 1
    try:
        api_fd, events_fd, lifeline_fd = map(int, fds)
        status = lead(api_fd, events_fd, lifeline_fd, signals=True)
    except PileusError as error:
        sys.stderr.write(f"pileus: {error}\n")
    finally:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)

"""A ring as its front-end describes it, message by message, and the descriptors that wake either side.

The numbers of the descriptors stay while what they mean changes: an engine may be about to write to one.
"""

import os

from pileus.errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.virtio.queue import Queue

EVENTFD = "anon_inode:[eventfd]"


class Vring:
    """The set-up of ``queue``, whose kick and call descriptors become the front-end's."""

    def __init__(self, index: int, queue: "Queue") -> None:
        self.index = index
        self.queue = queue
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, ...] | None = None  # descriptors, used, available: the front-end's hva
        self.enabled = False
        self.started = False  # it has a kick
        self.live = False  # the queue is active
        self.err = -1
        self.call = _silent()

    def set_kick(self, fd: int) -> None:
        """Of ``fd`` a copy is kept, as of the others; while the queue rests."""
        check_eventfd(fd)
        os.set_blocking(fd, False)
        os.dup2(fd, self.queue.kick_fd, inheritable=False)
        self.started = True

    def set_call(self, fd: int) -> None:
        """-1 for nobody; at any time."""
        if fd >= 0:
            check_eventfd(fd)
            os.dup2(fd, self.call, inheritable=False)
        else:
            self._silence(self.call)

    def set_err(self, fd: int) -> None:
        if fd >= 0:
            check_eventfd(fd)
            fd = os.dup(fd)
        if self.err >= 0:
            os.close(self.err)
        self.err = fd

    def stop(self) -> None:
        """Forget the kick: the front-end has to give it again."""
        self._silence(self.queue.kick_fd)
        self.started = False

    def unblock(self) -> None:
        """Free an engine that waits for the front-end's eventfds, which it may have made blocking ones."""
        kick, call = self.queue.kick_fd, os.dup(self.call)
        self._silence(self.call)
        try:
            os.set_blocking(kick, False)
            os.set_blocking(call, False)
            os.eventfd_write(kick, 1)
            os.eventfd_read(call)
        except OSError:
            pass
        os.close(call)

    def close(self) -> None:
        self.queue.call_fd = -1
        self.stop()
        self.set_err(-1)
        os.close(self.call)

    def tell_error(self) -> None:
        if self.err >= 0:
            try:
                os.set_blocking(self.err, False)
                os.eventfd_write(self.err, 1)
            except OSError:
                pass

    def _silence(self, fd: int) -> None:
        silent = _silent()
        os.dup2(silent, fd, inheritable=False)
        os.close(silent)


def check_eventfd(fd: int) -> None:
    """Anything else could be made to block whoever signals it. Raises RemoteProtocolError."""
    try:
        kind = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return  # no /proc: nobody can say
    if kind != EVENTFD:
        raise RemoteProtocolError(f"a kick, call or err descriptor is no eventfd: {kind}")


def _silent() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

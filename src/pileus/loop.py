"""The control loop: file descriptors, and calls that wait for their time. One thread, level-triggered."""

import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT


class Timer:
    """A call that is due; ``cancel`` makes it not happen."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: "Callable[[], None]") -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Calls back when a watched fd is ready or a timer is due. All callbacks run on the loop's thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._posted: list[Callable[[], None]] = []
        self._post_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._running = False
        self.watch(self._post_fd, READABLE, self._call_posted)

    def watch(self, fd: int, events: int, call: "Callable[[int], None]") -> None:
        """Call ``call(ready_events)`` whenever ``fd`` has one of ``events`` (or an error or a hang-up)."""
        self._epoll.register(fd, events)
        self._watched[fd] = call

    def change(self, fd: int, events: int) -> None:
        """Wait for other ``events`` of a watched fd; 0 leaves errors and hang-ups only."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``: call this before closing it. Nothing happens if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, call: "Callable[[], None]") -> Timer:
        """Call ``call()`` once, ``seconds`` from now."""
        timer = Timer(time.monotonic() + seconds, call)
        self._timers.append(timer)
        self._timers.sort(key=lambda each: each.due)
        return timer

    def post(self, call: "Callable[[], None]") -> None:
        """Call ``call()`` soon, on the loop's thread. This one method may be called from any thread."""
        self._posted.append(call)
        os.eventfd_write(self._post_fd, 1)

    def run(self) -> None:
        """Serve until ``stop``."""
        self._running = True
        while self._running:
            for fd, events in self._epoll.poll(self._patience()):
                if self._running and (call := self._watched.get(fd)) is not None:
                    call(events)
            self._call_due()

    def stop(self) -> None:
        """Let ``run`` return once the present callback is over; what else is due waits for its next call."""
        self._running = False

    def close(self) -> None:
        self._epoll.close()
        os.close(self._post_fd)

    def _call_posted(self, _events: int) -> None:
        """One of them: the eventfd counts, so each wakes the loop on its own and may stop it."""
        os.eventfd_read(self._post_fd)
        self._posted.pop(0)()

    def _patience(self) -> float:
        """Seconds until the next timer, or -1 for ever."""
        return max(0.0, self._timers[0].due - time.monotonic()) if self._timers else -1

    def _call_due(self) -> None:
        now = time.monotonic()
        while self._running and self._timers and self._timers[0].due <= now:
            if (call := self._timers.pop(0).call) is not None:
                call()

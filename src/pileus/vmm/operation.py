"""What takes long, beside the control loop: on a thread of its own, with progress; it can be cancelled."""

import _thread

from pileus import log
from pileus.errors import PileusError
from pileus.kvm._vcpu import name_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.vmm.loop import Loop

    Ended = Callable[[Exception | None], None]
    Work = Callable[[Callable[[int], None]], None]


class CancelledError(PileusError):
    """Somebody thought better of it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the {name} was cancelled")


class Operation:
    """``work(advance)`` on its own thread; then ``ended(error)`` on the loop's, None where all went well.

    ``done`` of ``total`` bytes are over. Who waits for its end says so by ``then``.
    """

    def __init__(
        self, name: str, total: int, loop: "Loop", ended: "Callable[[Exception | None], None]"
    ) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._loop = loop
        self._ended = ended
        self._waiting: list[Ended] = []
        self._cancelled = self._concluded = False
        self._error: Exception | None = None
        self._alive = _thread.allocate_lock()  # held while the thread lives

    def start(self, work: "Work") -> None:
        self._alive.acquire()
        try:
            _thread.start_new_thread(self._main, (work,))
        except BaseException:
            self._alive.release()
            raise

    def then(self, call: "Ended") -> None:
        """Also call ``call(error)`` at the end, after ``ended``."""
        self._waiting.append(call)

    def cancel(self) -> None:
        """Give it up; all that comes after its end has happened when this returns. On the loop's thread."""
        self._cancelled = True
        with self._alive:
            pass
        self._conclude()

    def _advance(self, count: int) -> None:
        self.done += count
        if self._cancelled:
            raise CancelledError(self.name)

    def _main(self, work: "Work") -> None:
        try:
            name_thread(self.name)
            work(self._advance)
        except PileusError as error:
            self._error = error
        except Exception as error:
            log.exception(error)
            self._error = error
        finally:
            self._loop.post(self._conclude)  # the loop may be gone once this is not alive
            self._alive.release()

    def _conclude(self) -> None:
        if self._concluded:
            return
        self._concluded = True
        self._ended(self._error)
        for call in self._waiting:
            call(self._error)

"""What to undo, last made first. contextlib.ExitStack, without what importing contextlib costs a start."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, TypeVar

    class Closeable(Protocol):
        def close(self) -> object: ...

    T = TypeVar("T", bound=Closeable)


class Cleanup:
    """Closes what was given to ``own`` in the opposite order; the failure of one does not spare the next."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def own(self, thing: "T") -> "T":
        """Close ``thing`` in the end; returns it."""
        self._calls.append(thing.close)
        return thing

    def call(self, call: "Callable[[], object]") -> None:
        """Call ``call()`` in the end."""
        self._calls.append(call)

    def close(self) -> None:
        """Undo all. Raises the first exception met, once everything was tried."""
        failure: BaseException | None = None
        while self._calls:
            try:
                self._calls.pop()()
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

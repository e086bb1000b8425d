from types import TracebackType
from typing import Self

class Image:
    path: str
    format: str
    fd: int
    readonly: bool
    direct: bool
    size: int
    logical_block: int
    physical_block: int
    can_discard: bool
    plain: bool
    guarded: int
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def close(self) -> None: ...

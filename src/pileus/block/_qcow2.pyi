from typing import Protocol

from pileus.block._image import Image

class Layout(Protocol):
    """What of a header the compiled half needs to know."""

    @property
    def version(self) -> int: ...
    @property
    def cluster_bits(self) -> int: ...
    @property
    def zstd(self) -> bool: ...
    @property
    def refcount_order(self) -> int: ...
    @property
    def refcount_table_offset(self) -> int: ...
    @property
    def refcount_table_clusters(self) -> int: ...
    def tables(self) -> list[tuple[int, int, str]]: ...

class Qcow2Image(Image):
    backing: Image | None
    version: int
    cluster_bits: int
    align: int
    def __init__(
        self,
        fd: int,
        path: str,
        header: Layout,
        *,
        size: int,
        l1: tuple[int, int],
        direct: bool,
        align: int,
        backing: Image | None,
    ) -> None: ...

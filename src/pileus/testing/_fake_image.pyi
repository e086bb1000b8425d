from pileus.block._image import Image

class FakeImage(Image):
    events: list[tuple[str, int, int]]
    errors: dict[str, int]
    held: int
    waited: int
    def __init__(
        self, size: int, kinds: str = "d", *, piece: int = 4096, readonly: bool = False, gated: bool = False
    ) -> None: ...
    @property
    def content(self) -> bytes: ...
    @content.setter
    def content(self, data: bytes) -> None: ...
    def open_gate(self) -> None: ...

"""A function's configuration space: 256 bytes, each with a mask of the bits that a driver may write.

Source: PCI Local Bus 3.0, 6.1 (Configuration Space Organization) and 6.2.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Hook = Callable[[int, int], None]

SIZE = 256
COMMAND, STATUS, BARS, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
ROM = 0x30
BAR_COUNT = 6
MEMORY_ENABLE, BUS_MASTER, PARITY, SERR, INTX_DISABLE = 1 << 1, 1 << 2, 1 << 6, 1 << 8, 1 << 10
HAS_CAPABILITIES = 1 << 4  # status

HEADER = {  # name -> offset, size, the bits a driver may write; all else is zero
    "vendor": (0x00, 2, 0),
    "device": (0x02, 2, 0),
    "command": (COMMAND, 2, MEMORY_ENABLE | BUS_MASTER | PARITY | SERR | INTX_DISABLE),
    "status": (STATUS, 2, 0),
    "revision": (0x08, 1, 0),
    "class_code": (0x09, 3, 0),
    "cache_line": (0x0C, 1, 0xFF),
    "subsystem_vendor": (0x2C, 2, 0),
    "subsystem": (0x2E, 2, 0),
    "capabilities": (CAPABILITIES, 1, 0),
    "interrupt_line": (0x3C, 1, 0xFF),
}


class ConfigSpace:
    """Type 0 header and capabilities; ``values`` are fields of HEADER.

    Every offset and size is allowed: what lies outside reads as ones and takes no write.
    """

    def __init__(self, **values: int) -> None:
        self.data = bytearray(SIZE)
        self.mask = bytearray(SIZE)
        self.slow = bytearray(SIZE)  # 1 for a byte that a hook may change before it is read
        self._readers: list[tuple[int, int, Hook]] = []
        self._writers: list[tuple[int, int, Hook]] = []
        for name, (offset, size, writable) in HEADER.items():
            self.set(offset, size, values.pop(name, 0))
            self.allow(offset, size, writable)
        if values:
            raise ValueError(f"no field of a header: {', '.join(values)}")

    def get(self, offset: int, size: int) -> int:
        """What is stored; no hook is called."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def set(self, offset: int, size: int, value: int) -> None:
        """Store, whatever a driver may write; no hook is called."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def allow(self, offset: int, size: int, writable: int) -> None:
        """Let a driver write the bits of ``writable``."""
        self.mask[offset : offset + size] = writable.to_bytes(size, "little")

    def before_read(self, offset: int, size: int, hook: "Hook") -> None:
        """Call ``hook(offset, size)`` of an access that touches the range, before it is served."""
        self._readers.append((offset, offset + size, hook))
        self.slow[offset : offset + size] = b"\1" * size

    def after_write(self, offset: int, size: int, hook: "Hook") -> None:
        """Call ``hook(offset, size)`` of an access that touches the range, once it was stored."""
        self._writers.append((offset, offset + size, hook))

    def read(self, offset: int, size: int) -> int:
        """A driver's read."""
        if offset + size > SIZE:
            return (1 << (8 * size)) - 1
        for start, end, hook in self._readers:
            if start < offset + size and offset < end:
                hook(offset, size)
        return self.get(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A driver's write."""
        if offset + size > SIZE:
            return
        mask = int.from_bytes(self.mask[offset : offset + size], "little")
        self.set(offset, size, self.get(offset, size) & ~mask | value & mask)
        for start, end, hook in self._writers:
            if start < offset + size and offset < end:
                hook(offset, size)

    def state(self) -> bytes:
        return bytes(self.data)

    def restore(self, state: bytes) -> None:
        """Take back what a driver wrote; the rest stays as made. Raises ValueError if it is no state."""
        if len(state) != SIZE:
            raise ValueError(f"a configuration space is {SIZE} bytes, not {len(state)}")
        for offset, (old, new, mask) in enumerate(zip(self.data, state, self.mask, strict=True)):
            self.data[offset] = old & ~mask | new & mask

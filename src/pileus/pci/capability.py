"""The linked list of capabilities in configuration space.

Source: PCI Local Bus 3.0, 6.7 (Capabilities List).
"""

from pileus.pci.config_space import CAPABILITIES, HAS_CAPABILITIES, SIZE, STATUS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.pci.config_space import ConfigSpace

FIRST = 0x40
ALIGNMENT = 4
HEADER_SIZE = 2  # id, next
POWER, MSI, VENDOR_SPECIFIC, EXPRESS, MSIX, ADVANCED = 0x01, 0x05, 0x09, 0x10, 0x11, 0x13


class Capabilities:
    """Appends capabilities to ``config``, one behind the other, in the order a driver finds them."""

    def __init__(self, config: "ConfigSpace") -> None:
        self._config = config
        self._end = FIRST
        self._last_pointer = CAPABILITIES

    def add(self, identifier: int, body: bytes, writable: bytes = b"") -> int:
        """Return where the new capability is. ``body`` follows its id and next pointer; so does ``writable``,
        the bits of it that a driver may write. Raises ValueError where there is no room."""
        offset, config = self._end, self._config
        end = offset + HEADER_SIZE + len(body)
        if end > SIZE or len(writable) > len(body):
            raise ValueError(f"capability {identifier:#x} of {len(body)} bytes does not fit at {offset:#x}")
        config.data[offset:end] = bytes([identifier, 0]) + body
        start = offset + HEADER_SIZE
        config.mask[start : start + len(writable)] = writable
        config.set(self._last_pointer, 1, offset)
        config.set(STATUS, 2, config.get(STATUS, 2) | HAS_CAPABILITIES)
        self._last_pointer = offset + 1
        self._end = -(-end // ALIGNMENT) * ALIGNMENT
        return offset

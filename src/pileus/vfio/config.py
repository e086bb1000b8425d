"""Configuration space of a device that passes through: some registers are ours, the others the device's.

What decides where the guest finds the device, and how it interrupts, is ours: BARs, the chain of
capabilities, MSI and MSI-X, power states. Everything else is read from the device, and written to it.
"""

from pileus.errors import ConfigError
from pileus.pci import capability
from pileus.pci.capability import FIRST, HEADER_SIZE
from pileus.pci.config_space import (
    BARS,
    CAPABILITIES,
    COMMAND,
    HAS_CAPABILITIES,
    HEADER,
    MEMORY_ENABLE,
    SIZE,
    STATUS,
    ConfigSpace,
)
from pileus.vfio import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pileus.vfio.backend import Backend

OURS, BOTH, DEVICES = range(3)  # whose a byte is; of both: what we store goes to the device, too
HEADER_END = 0x40
HEADER_TYPE, BIST, CIS = 0x0E, 0x0F, 0x28
TYPE_MASK = 0x7F
MAX_CAPABILITIES = (SIZE - FIRST) // 4

# PCI Express Base 3.0, 7.8: offsets in its capability.
EXPRESS_FLAGS, EXPRESS_DEVICE, EXPRESS_CONTROL, EXPRESS_LINK, EXPRESS_LINK_END = 0x02, 0x04, 0x08, 0x0C, 0x14
PORT_TYPE, PORT_SHIFT = 0xF0, 4
ENDPOINT, LEGACY_ENDPOINT, ROOT_COMPLEX_ENDPOINT = 0, 1, 9
FLR_CAPABLE, FLR = 1 << 28, 1 << 15
# PCI ECN Advanced Capabilities.
ADVANCED_FEATURES, ADVANCED_CONTROL, ADVANCED_FLR = 0x03, 0x04, 1 << 1
ADVANCED_INITIATE = 1
# PCI Power Management 1.2, 3.2.4.
POWER_CONTROL, POWER_STATE, POWER_NO_RESET = 0x04, 0x3, 1 << 3


class PassThroughConfig(ConfigSpace):
    """The registers of ``backend``'s device. ``found`` is where its capabilities are, by their ids.

    ``flr()`` is called when a driver resets the function. Raises ConfigError for what is no type 0 function.
    """

    def __init__(self, backend: "Backend", flr: "Callable[[], None]") -> None:
        super().__init__()
        self._backend = backend
        self._flr = flr
        self._whose = bytearray([OURS] * HEADER_END + [DEVICES] * (SIZE - HEADER_END))
        self._whose[COMMAND : COMMAND + 4] = bytes([BOTH, BOTH, DEVICES, DEVICES])
        for offset in range(0, SIZE, 4):
            self.data[offset : offset + 4] = backend.read(abi.CONFIG, offset, 4).to_bytes(4, "little")
        if self.get(0, 2) in (0, 0xFFFF) or self.data[HEADER_TYPE] & TYPE_MASK:
            raise ConfigError("device", backend.name, "it is no PCI function of type 0, or does not answer")
        self.bar_flags = [self.get(BARS + 4 * index, 4) for index in range(6)]
        self.data[BARS:CIS] = bytes(CIS - BARS)
        self.data[HEADER_TYPE] = self.data[BIST] = 0
        self.data[CIS : CIS + 4] = bytes(4)
        self.data[0x30:0x34] = bytes(4)  # the expansion ROM
        self.set(COMMAND, 2, 0)
        self.found: dict[int, int] = {}
        self._keep_capabilities()
        self._own_power()
        self._own_express()
        self._own_advanced()
        self._mark_slow()

    def own(self, offset: int, size: int, writable: int = 0) -> None:
        """Let these bytes be ours, as they are; a driver may write the bits of ``writable``."""
        self._whose[offset : offset + size] = bytes([OURS] * size)
        self.allow(offset, size, writable)
        self._mark_slow()

    def read(self, offset: int, size: int) -> int:
        if offset + size > SIZE:
            return (1 << (8 * size)) - 1
        for at, length in self._runs(offset, size, {DEVICES}):
            self.set(at, length, self._backend.read(abi.CONFIG, at, length))
            if at <= STATUS < at + length:
                bit = HAS_CAPABILITIES if self.data[CAPABILITIES] else 0
                self.data[STATUS] = self.data[STATUS] & ~HAS_CAPABILITIES | bit
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A device decodes memory before the guest finds it there, and after the guest does not any more."""
        if offset + size > SIZE:
            return
        value, reset = self._without_flr(offset, size, value)
        enables = not self.get(COMMAND, 2) & MEMORY_ENABLE and offset <= COMMAND < offset + size
        if enables:
            self._forward(offset, size, value)
        super().write(offset, size, value)
        if not enables:
            self._forward(offset, size, value)
        if reset:
            self._flr()

    def forget(self) -> None:
        """What a driver wrote, as after a reset; the hooks of registers are not called."""
        line, mask = HEADER["interrupt_line"][0], self.mask
        kept = self.data[line]
        for offset in range(SIZE):
            if self._whose[offset] != DEVICES:
                self.data[offset] &= ~mask[offset] & 0xFF
        self.data[line] = kept

    def _forward(self, offset: int, size: int, value: int) -> None:
        data = bytearray(value.to_bytes(size, "little"))
        for at in range(size):
            if self._whose[offset + at] == BOTH:  # perhaps not stored yet
                mask = self.mask[offset + at]
                data[at] = self.data[offset + at] & ~mask | data[at] & mask
        for at, length in self._runs(offset, size, {BOTH, DEVICES}):
            piece = int.from_bytes(data[at - offset : at - offset + length], "little")
            self._backend.write(abi.CONFIG, at, length, piece)

    def _runs(self, offset: int, size: int, whose: "set[int]") -> "Iterator[tuple[int, int]]":
        """The pieces of an access that are one of ``whose``, aligned and of 1, 2 or 4 bytes."""
        at, end = offset, offset + size
        while at < end:
            if self._whose[at] not in whose:
                at += 1
                continue
            length = next(
                length
                for length in (4, 2, 1)
                if not at % length and at + length <= end and whose >= set(self._whose[at : at + length])
            )
            yield at, length
            at += length

    def _without_flr(self, offset: int, size: int, value: int) -> tuple[int, bool]:
        """``value`` without the bit that resets the function, and whether it was there."""
        for where, bit in self._flr_bits:
            shift = 8 * (where - offset)
            if 0 <= shift < 8 * size and value >> shift & bit:
                return value & ~(bit << shift), True
        return value, False

    def _mark_slow(self) -> None:
        self.slow[:] = bytes(whose == DEVICES for whose in self._whose)
        for start, end, _ in self._readers:
            self.slow[start:end] = b"\1" * (end - start)

    # -- capabilities -----------------------------------------------------------------------------

    def _keep_capabilities(self) -> None:
        """Those that are whole and that there is one of, in the device's order; their heads are ours."""
        pointer, last = self.data[CAPABILITIES] & ~3, CAPABILITIES
        self.data[CAPABILITIES] = 0
        seen: set[int] = set()
        while FIRST <= pointer <= SIZE - HEADER_SIZE and pointer not in seen and len(seen) < MAX_CAPABILITIES:
            seen.add(pointer)
            identifier, following = self.data[pointer], self.data[pointer + 1] & ~3
            if self._is_wanted(identifier, pointer):
                self.found[identifier] = pointer
                self.data[last] = pointer
                last = pointer + 1
                self._whose[pointer : pointer + HEADER_SIZE] = bytes([OURS] * HEADER_SIZE)
            pointer = following
        if last != CAPABILITIES:
            self.data[last] = 0

    def _is_wanted(self, identifier: int, pointer: int) -> bool:
        length = LENGTHS.get(identifier, HEADER_SIZE)
        if identifier == capability.MSI:
            length = msi_length(self.get(pointer + HEADER_SIZE, 2)) if pointer + 4 <= SIZE else SIZE
        kind = {capability.MSI: abi.MSI, capability.MSIX: abi.MSIX}.get(identifier)
        if kind is not None and not self._backend.irqs.get(kind):
            return False
        if identifier in UNIQUE and identifier in self.found:
            return False
        return identifier not in HIDDEN and pointer + length <= SIZE

    def _own_power(self) -> None:
        """A device stays awake: asleep, its BARs could not be accessed, and the guest would find that out."""
        if (at := self.found.get(capability.POWER)) is not None:
            self.set(at + POWER_CONTROL, 2, POWER_NO_RESET)
            self._whose[at + POWER_CONTROL : at + POWER_CONTROL + 2] = bytes([OURS] * 2)
            self.allow(at + POWER_CONTROL, 2, POWER_STATE)

    def _own_express(self) -> None:
        """On the root bus there are no links, so that the device is part of the root complex."""
        at = self.found.get(capability.EXPRESS)
        if at is None:
            return
        flags = self.get(at + EXPRESS_FLAGS, 2)
        if (flags & PORT_TYPE) >> PORT_SHIFT in (ENDPOINT, LEGACY_ENDPOINT):
            self.set(at + EXPRESS_FLAGS, 2, flags & ~PORT_TYPE | ROOT_COMPLEX_ENDPOINT << PORT_SHIFT)
            link = slice(at + EXPRESS_LINK, at + EXPRESS_LINK_END)
            self.data[link] = bytes(EXPRESS_LINK_END - EXPRESS_LINK)
            self._whose[link] = bytes([OURS] * (EXPRESS_LINK_END - EXPRESS_LINK))
        self._whose[at + EXPRESS_FLAGS : at + EXPRESS_CONTROL] = bytes(
            [OURS] * (EXPRESS_CONTROL - EXPRESS_FLAGS)
        )

    def _own_advanced(self) -> None:
        self._flr_bits: list[tuple[int, int]] = []  # register, bit
        if (at := self.found.get(capability.EXPRESS)) is not None and self.get(
            at + EXPRESS_DEVICE, 4
        ) & FLR_CAPABLE:
            self._flr_bits.append((at + EXPRESS_CONTROL + 1, FLR >> 8))
        if (at := self.found.get(capability.ADVANCED)) is not None:
            self._whose[at + 2 : at + 4] = bytes([OURS] * 2)
            if self.data[at + ADVANCED_FEATURES] & ADVANCED_FLR:
                self._flr_bits.append((at + ADVANCED_CONTROL, ADVANCED_INITIATE))


MSI_64BIT, MSI_MASKING = 1 << 7, 1 << 8
LENGTHS = {  # bytes that must be there
    capability.POWER: 8,
    capability.EXPRESS: EXPRESS_LINK_END,
    capability.MSIX: 12,
    capability.ADVANCED: 6,
}
UNIQUE = {capability.POWER, capability.MSI, capability.EXPRESS, capability.MSIX, capability.ADVANCED}
ENHANCED_ALLOCATION = 0x14
HIDDEN = {0, 0xFF, ENHANCED_ALLOCATION}


def msi_length(control: int) -> int:
    """PCI Local Bus 3.0, 6.8.1: bytes of an MSI capability."""
    return 10 + (4 if control & MSI_64BIT else 0) + (10 if control & MSI_MASKING else 0)

"""The CMOS memory with its real-time clock: the time of day, and how much RAM there is.

Source: Motorola MC146818A data sheet; the memory sizes as in Cloud Hypervisor 0.3.
"""

import time

from pileus.bus import PythonDevice
from pileus.config.units import GIB, KIB, MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INDEX, DATA = 0, 1  # offsets from port 0x70
INDEX_MASK = 0x7F  # bit 7 masks NMIs: there are none
REGISTERS = 128
HOURS = 0x04
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
DIVIDER_32KHZ = 0x26  # A: time base and rate; bit 7, update in progress, never shows
HOURS_24, BINARY = 0x02, 0x04  # B
VALID = 0x80  # D: the battery is fine
PM = 0x80

CLOCK = {  # register -> what it tells of a struct_time in UTC
    0x00: lambda now: now.tm_sec,
    0x02: lambda now: now.tm_min,
    0x04: lambda now: now.tm_hour,
    0x06: lambda now: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1
    0x07: lambda now: now.tm_mday,
    0x08: lambda now: now.tm_mon,
    0x09: lambda now: now.tm_year % 100,
    0x32: lambda now: now.tm_year // 100,
}


class Rtc(PythonDevice):
    """Two ports. ``now`` gives the seconds since 1970; ``ram_size`` is in bytes.

    The guest cannot set the clock: what it writes there is lost. Registers without a meaning are storage.
    """

    def __init__(self, ram_size: int, now: "Callable[[], float]" = time.time) -> None:
        self._now = now
        self._index = 0
        self._registers = bytearray(REGISTERS)
        self._registers[REGISTER_A] = DIVIDER_32KHZ
        self._registers[REGISTER_B] = HOURS_24
        self._registers[REGISTER_D] = VALID
        self._fixed = {REGISTER_C, REGISTER_D, *CLOCK, *self._set_memory(ram_size)}

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return (1 << (8 * size)) - 1
        if offset == INDEX:
            return self._index
        if self._index in CLOCK:
            return self._clock(self._index)
        return self._registers[self._index]

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        if offset == INDEX:
            self._index = value & INDEX_MASK
        elif self._index not in self._fixed:
            self._registers[self._index] = value

    def state(self) -> dict[str, int | bytes]:
        return {"index": self._index, "registers": bytes(self._registers)}

    def restore(self, state: dict[str, int | bytes]) -> None:
        """Take back ``state``; the time stays the host's. Raises ValueError if it is not one."""
        index, registers = state["index"], state["registers"]
        if not isinstance(index, int) or not isinstance(registers, bytes) or len(registers) != REGISTERS:
            raise ValueError("rtc: not a state of this device")
        self._index = index & INDEX_MASK
        self._registers[:] = registers

    def _set_memory(self, size: int) -> dict[int, int]:
        """Tell the RAM from 16 MiB to 3 GiB, and that above 4 GiB, in 64 KiB units, little endian."""
        low = max(0, min(size, 3 * GIB) - 16 * MIB) // (64 * KIB)
        high = max(0, size - 3 * GIB) // (64 * KIB)
        registers = dict(enumerate(low.to_bytes(2, "little"), 0x34))
        registers |= dict(enumerate((high & 0xFFFFFF).to_bytes(3, "little"), 0x5B))
        for register, value in registers.items():
            self._registers[register] = value
        return registers

    def _clock(self, register: int) -> int:
        value: int = CLOCK[register](time.gmtime(self._now()))
        format_ = self._registers[REGISTER_B]
        afternoon = 0
        if register == HOURS and not format_ & HOURS_24:
            afternoon = PM if value >= 12 else 0
            value = (value + 11) % 12 + 1
        return afternoon | (value if format_ & BINARY else value // 10 << 4 | value % 10)

"""A slow IOAPIC written from the data sheet, a pin an object, and the local APICs around it."""

from dataclasses import dataclass

PINS = 24


@dataclass
class Pin:
    """One redirection entry, field by field."""

    vector: int = 0
    mode: int = 0
    logical: int = 0
    polarity: int = 0
    level: int = 0
    masked: int = 1
    extended: int = 0
    destination: int = 0
    remote_irr: bool = False
    driven: bool = False
    latched: bool = False

    @property
    def asserted(self) -> bool:
        return self.driven or self.latched

    @property
    def waits_for_eoi(self) -> bool:
        return self.level == 1 and self.mode in (0, 1)

    @property
    def due(self) -> bool:
        return self.waits_for_eoi and not self.masked and not self.remote_irr and self.asserted

    @property
    def message(self) -> tuple[int, int] | None:
        if self.mode in (3, 6, 7):
            return None
        address = 0xFEE00000 + (self.destination << 12) + (self.extended << 5) + (self.logical << 2)
        return address, self.vector + (self.mode << 8) + (0xC000 if self.waits_for_eoi else 0)

    @property
    def route(self) -> tuple[int, int] | None:
        return None if self.masked and not self.remote_irr else self.message

    def words(self) -> tuple[int, int]:
        low = self.vector | self.mode << 8 | self.logical << 11 | int(self.due) << 12 | self.polarity << 13
        low |= int(self.remote_irr) << 14 | self.level << 15 | self.masked << 16
        return low, self.extended << 17 | self.destination << 24


class IoapicTwin:
    """Says what Ioapic is to say; ``takes`` is whether local APICs take messages now."""

    def __init__(self) -> None:
        self.pins = [Pin() for _ in range(PINS)]
        self.identity = 0
        self.index = 0
        self.takes = True
        self.sent: list[tuple[int, int]] = []
        self.ended: list[int] = []

    def read(self, offset: int, size: int) -> int:
        if size != 4 or offset not in (0x00, 0x10):
            return (1 << 8 * size) - 1
        if offset == 0x00:
            return self.index
        if self.index in (0, 2):
            return self.identity << 24
        if self.index == 1:
            return 0x00170020
        if 0x10 <= self.index < 0x10 + 2 * PINS:
            low, high = self.pins[(self.index - 0x10) // 2].words()
            return high if self.index % 2 else low
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        if offset == 0x00:
            self.index = value % 256
        elif offset == 0x10 and self.index == 0:
            self.identity = value >> 24 & 0xF
        elif offset == 0x10 and 0x10 <= self.index < 0x10 + 2 * PINS:
            self._write_entry(self.pins[(self.index - 0x10) // 2], self.index % 2, value)
        elif offset == 0x40:
            self.end_of_interrupt(value % 256)

    def _write_entry(self, pin: Pin, high: int, value: int) -> None:
        if high:
            pin.extended, pin.destination = value >> 17 & 0x7F, value >> 24
        else:
            pin.vector, pin.mode, pin.logical = value & 0xFF, value >> 8 & 7, value >> 11 & 1
            pin.polarity, pin.level, pin.masked = value >> 13 & 1, value >> 15 & 1, value >> 16 & 1
            if not pin.waits_for_eoi:
                pin.remote_irr = False
        self._settle(pin)

    def _settle(self, pin: Pin) -> None:
        if pin.due and pin.message:
            pin.remote_irr = self._send(pin.message)

    def _send(self, message: tuple[int, int]) -> bool:
        self.sent.append(message)
        return self.takes

    def end_of_interrupt(self, vector: int) -> None:
        served = [pin for pin in self.pins if pin.remote_irr and pin.vector == vector]
        for pin in served:
            pin.remote_irr = pin.latched = False
        for pin in served:
            self.ended.append(next(number for number, each in enumerate(self.pins) if each is pin))
            self._settle(pin)

    def set_line(self, number: int, level: bool) -> None:
        pin = self.pins[number]
        rising = level and not pin.asserted
        pin.driven = level
        self._driven(pin, rising)

    def latch(self, number: int) -> None:
        pin = self.pins[number]
        rising = not pin.asserted
        pin.latched = True
        self._driven(pin, rising)

    def unlatch(self, number: int) -> None:
        self.pins[number].latched = False

    def _driven(self, pin: Pin, rising: bool) -> None:
        if pin.waits_for_eoi:
            self._settle(pin)
        elif rising and not pin.masked and pin.message:
            self._send(pin.message)

    def routes(self) -> dict[int, tuple[int, int] | None]:
        return {number: pin.route for number, pin in enumerate(self.pins)}

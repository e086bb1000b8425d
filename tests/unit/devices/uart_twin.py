"""A slow 16550A to compare the compiled one with: one Python method per rule of the data sheet."""

TRIGGER = (1, 4, 8, 14)


class Twin:
    """``out`` is what the guest sent; ``capacity`` is how much more of that the host takes."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.capacity: int | None = None  # None: no limit
        self.edges = 0
        self.wire: list[int] = []
        self.looped: list[int] = []
        self.sending: list[int] = []
        self.regs = {"ier": 0, "fcr": 0, "lcr": 3, "mcr": 8, "scr": 0, "dll": 12, "dlm": 0}
        self.errors = self.deltas = 0
        self.empty_pending = False
        self.last = 1

    # what a guest does

    def load(self, offset: int) -> int:
        dlab = bool(self.regs["lcr"] & 0x80)
        if offset in (0, 1) and dlab:
            value = self.regs["dlm" if offset else "dll"]
        else:
            value = getattr(self, f"_load_{offset}")()
        self._edge()
        return value

    def store(self, offset: int, value: int) -> None:
        dlab = bool(self.regs["lcr"] & 0x80)
        if offset in (0, 1) and dlab:
            self.regs["dlm" if offset else "dll"] = value
        else:
            getattr(self, f"_store_{offset}")(value)
        self._edge()

    # what the host does

    def feed(self, data: bytes) -> None:
        self.wire += data
        self._edge()

    def make_room(self, capacity: int | None) -> None:
        self.capacity = capacity
        if self.sending:
            self._flush()
        self._edge()

    # registers

    def _load_0(self) -> int:
        if not self.received:
            return 0
        return self.looped.pop(0) if self.looped else self.wire.pop(0)

    def _load_1(self) -> int:
        return self.regs["ier"]

    def _load_2(self) -> int:
        reason = self.reason
        if reason == 2:
            self.empty_pending = False
        return reason | (0xC0 if self.fifos else 0)

    def _load_3(self) -> int:
        return self.regs["lcr"]

    def _load_4(self) -> int:
        return self.regs["mcr"]

    def _load_5(self) -> int:
        errors, self.errors = self.errors, 0
        return errors | (1 if self.received else 0) | (0 if self.sending else 0x60)

    def _load_6(self) -> int:
        deltas, self.deltas = self.deltas, 0
        return self.lines | deltas

    def _load_7(self) -> int:
        return self.regs["scr"]

    def _store_0(self, value: int) -> None:
        if self.regs["mcr"] & 0x10:
            if len(self.looped) < self.depth:
                self.looped.append(value)
            else:
                self.errors |= 2
            self.empty_pending = True
            return
        if len(self.sending) < self.depth:
            self.sending.append(value)
        self._flush()

    def _store_1(self, value: int) -> None:
        if value & 2 and not self.regs["ier"] & 2 and not self.sending:
            self.empty_pending = True
        self.regs["ier"] = value & 0xF

    def _store_2(self, value: int) -> None:
        toggled = (value & 1) != (self.regs["fcr"] & 1)
        if toggled or value & 2:
            self.looped.clear()
        if (toggled or value & 4) and self.sending:
            self.sending.clear()
            self.empty_pending = True
        self.regs["fcr"] = value & 0xC9 if value & 1 else 0

    def _store_3(self, value: int) -> None:
        self.regs["lcr"] = value

    def _store_4(self, value: int) -> None:
        before = self.lines
        self.regs["mcr"] = value & 0x1F
        for line, delta in ((0x10, 1), (0x20, 2), (0x80, 8)):
            if (before ^ self.lines) & line:
                self.deltas |= delta
        if before & 0x40 and not self.lines & 0x40:
            self.deltas |= 4

    def _store_5(self, value: int) -> None:
        pass

    _store_6 = _store_5

    def _store_7(self, value: int) -> None:
        self.regs["scr"] = value

    # rules

    @property
    def fifos(self) -> bool:
        return bool(self.regs["fcr"] & 1)

    @property
    def depth(self) -> int:
        return 16 if self.fifos else 1

    @property
    def received(self) -> int:
        if self.regs["mcr"] & 0x10:
            return len(self.looped)
        return min(self.depth, len(self.looped) + len(self.wire))

    @property
    def lines(self) -> int:
        mcr = self.regs["mcr"]
        if not mcr & 0x10:
            return 0xB0
        pairs = ((0x02, 0x10), (0x01, 0x20), (0x04, 0x40), (0x08, 0x80))
        return sum(line for output, line in pairs if mcr & output)

    @property
    def reason(self) -> int:
        ier = self.regs["ier"]
        if ier & 4 and self.errors:
            return 0x06
        if ier & 1 and self.received:
            late = self.fifos and self.received < TRIGGER[self.regs["fcr"] >> 6]
            return 0x0C if late else 0x04
        if ier & 2 and self.empty_pending:
            return 0x02
        return 0x00 if ier & 8 and self.deltas else 0x01

    def _flush(self) -> None:
        while self.sending and self.capacity != 0:
            self.out.append(self.sending.pop(0))
            if self.capacity is not None:
                self.capacity -= 1
        self.empty_pending = not self.sending

    def _edge(self) -> None:
        reason = self.reason & 7
        if reason not in (1, self.last):
            self.edges += 1
        self.last = reason

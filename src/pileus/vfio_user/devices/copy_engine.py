"""A memory-copy engine: a driver names source, target and length, and gets an interrupt when it is done.

Registers in BAR 0: 0x00 source and 0x08 target, iovas of 64 bits; 0x10 length in bytes; 0x14 status, where a
write clears; 0x18 doorbell: whatever is written there begins the copy; 0x1C copies done so far. Vector 0 says
done, vector 1 failed; without messages, INTA is up while the status is not 0. BAR 2 is 4 KiB of memory that
the client may map.

Run it as ``python3 -m pileus.vfio_user.devices.copy_engine SOCKET``.
"""

import sys

from pileus.errors import PileusError
from pileus.vfio_user.device import Bar, PciDevice
from pileus.vfio_user.dma import DmaError
from pileus.vfio_user.server import serve

SOURCE, TARGET, LENGTH, STATUS, DOORBELL, COUNT = 0x00, 0x08, 0x10, 0x14, 0x18, 0x1C
DONE, FAILED = 1, 2
MAX_LENGTH = 64 << 20  # bytes a copy
CHUNK = 1 << 20


class CopyEngine(PciDevice):
    vendor, device, class_code = 0x1AF4, 0x10F7, 0x088000  # a system peripheral
    bars = {0: Bar(4096), 2: Bar(4096, prefetchable=True, shared=True)}  # noqa: RUF012 - never changed
    vectors = 2
    pin = True

    def __init__(self) -> None:
        super().__init__()
        self.registers = bytearray(0x20)

    def reset(self) -> None:
        self.registers[:] = bytes(len(self.registers))

    def read(self, bar: int, offset: int, size: int) -> int:
        return int.from_bytes(self.registers[offset : offset + size], "little")

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset < STATUS and offset + size <= STATUS:
            self.registers[offset : offset + size] = value.to_bytes(size, "little")
        elif offset == STATUS:
            self._set(STATUS, 0)
            self.set_line(False)
        elif offset == DOORBELL:
            self._copy()

    def _get(self, offset: int, size: int = 4) -> int:
        return self.read(0, offset, size)

    def _set(self, offset: int, value: int) -> None:
        self.registers[offset : offset + 4] = value.to_bytes(4, "little")

    def _copy(self) -> None:
        source, target, length = self._get(SOURCE, 8), self._get(TARGET, 8), self._get(LENGTH)
        done = length <= MAX_LENGTH
        try:
            for at in range(0, length if done else 0, CHUNK):
                self.dma.write(target + at, self.dma.read(source + at, min(CHUNK, length - at)))
        except DmaError:
            done = False
        self._set(COUNT, self._get(COUNT) + 1 & 0xFFFFFFFF)
        self._set(STATUS, DONE if done else FAILED)
        if self.irqs.messages:
            self.interrupt(0 if done else 1)
        else:
            self.set_line(True)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python3 -m pileus.vfio_user.devices.copy_engine SOCKET", file=sys.stderr)
        return 1
    try:
        serve(sys.argv[1], CopyEngine())
    except PileusError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

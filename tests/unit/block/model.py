"""Random work on an image, and beside it on plain bytes, which must always agree."""

import random

from pileus.testing._image import ImageDriver

SECTOR = 512


class Model:
    """``data`` is what the disk must hold. ``step`` does one thing to both."""

    weights = (50, 25, 10, 10, 5)  # write, read, write_zeroes, discard, flush

    def __init__(self, data: bytes, rng: random.Random) -> None:
        self.data, self.rng = bytearray(data), rng

    def step(self, driver: ImageDriver) -> str:
        """Returns what it did."""
        kinds = [self.write, self.read, self.write_zeroes, self.discard, self.flush]
        (work,) = self.rng.choices(kinds, self.weights)
        offset, length = self._range()
        work(driver, offset, length)
        return f"{work.__name__} {offset:#x} {length:#x}"

    def _range(self) -> tuple[int, int]:
        """Mostly small, some large; sectors."""
        sectors = len(self.data) // SECTOR
        offset = self.rng.randrange(sectors)
        most = self.rng.choice([1, 8, 64, 256, 4096])
        return offset * SECTOR, min(sectors - offset, self.rng.randint(1, most)) * SECTOR

    def write(self, driver: ImageDriver, offset: int, length: int) -> None:
        data = self.rng.randbytes(length)
        driver.write(offset, data)
        self.data[offset : offset + length] = data

    def read(self, driver: ImageDriver, offset: int, length: int) -> None:
        assert driver.read(offset, length) == self.data[offset : offset + length]

    def write_zeroes(self, driver: ImageDriver, offset: int, length: int) -> None:
        driver.write_zeroes(offset, length, self.rng.random() < 0.5)
        self.data[offset : offset + length] = bytes(length)

    def discard(self, driver: ImageDriver, offset: int, length: int) -> None:
        """Afterwards each sector reads as zeroes or as before."""
        driver.discard(offset, length)
        now = driver.read(offset, length)
        for at in range(0, length, SECTOR):
            sector = now[at : at + SECTOR]
            assert sector in (bytes(SECTOR), self.data[offset + at : offset + at + SECTOR])
        self.data[offset : offset + length] = now

    def flush(self, driver: ImageDriver, _offset: int, _length: int) -> None:
        driver.flush()

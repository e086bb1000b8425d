"""QEMU's client of vfio-user drives a device of ours; no guest runs, the test is its driver (qtest)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from pileus.vfio_user.devices.copy_engine import COUNT, DONE, DOORBELL, FAILED, LENGTH, SOURCE, STATUS, TARGET
from tests.peer.vhost_user import Backend

QEMU = Path(__file__).parents[2] / ".cache/emulator/bin/qemu-system-x86_64"
SLOT = 5
MIB = 1 << 20
MEMORY = 64 * MIB
BARS = {0: 0xE0000000, 2: 0xE0001000, 5: 0xE0002000}  # where the test puts them
ONES = 0xFFFFFFFF
COMMAND, BAR0 = 0x04, 0x10

pytestmark = pytest.mark.skipif(
    not QEMU.exists(), reason="no QEMU with vfio-user: scripts/nested and scripts/test fetch it"
)


class Machine:
    """An emulated machine whose processor does nothing; the test accesses ports and memory in its stead."""

    def __init__(self, socket: Path, shared: bool) -> None:
        backend = f"memory-backend-{'memfd,share=on' if shared else 'ram'},id=ram,size={MEMORY}"
        device = f'{{"driver":"vfio-user-pci","addr":"{SLOT}","socket":{{"type":"unix","path":"{socket}"}}}}'
        command = [str(QEMU), "-machine", "q35,accel=qtest,memory-backend=ram", "-object", backend]
        command += ["-m", f"{MEMORY // MIB}", "-nodefaults", "-display", "none"]
        command += ["-qtest", "stdio", "-qtest-log", "none", "-device", device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def do(self, command: str) -> str:
        """What QEMU answers; what it tells of interrupts meanwhile is no answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("OK"):
            assert line.startswith("IRQ"), f"{command}: {line}"
        return line.removeprefix("OK").strip()

    def config(self, register: int, value: int | None = None) -> int:
        self.do(f"outl 0xcf8 {0x80000000 | SLOT << 11 | register:#x}")
        return int(self.do("inl 0xcfc") if value is None else self.do(f"outl 0xcfc {value:#x}") or "0", 16)

    def load(self, gpa: int, letter: str = "l") -> int:
        return int(self.do(f"read{letter} {gpa:#x}"), 16)

    def store(self, gpa: int, value: int, letter: str = "l") -> None:
        self.do(f"write{letter} {gpa:#x} {value:#x}")

    def place_bars(self) -> None:
        for index, gpa in BARS.items():
            self.config(BAR0 + 4 * index, ONES)
            assert self.config(BAR0 + 4 * index) & ~0xF == -4096 & ONES
            self.config(BAR0 + 4 * index, gpa)
            if index != 5:
                self.config(BAR0 + 4 * index + 4, 0)
        self.config(COMMAND, 6)

    def copy(self, source: int, target: int, length: int) -> int:
        self.store(BARS[0] + SOURCE, source, "q")
        self.store(BARS[0] + TARGET, target, "q")
        self.store(BARS[0] + LENGTH, length)
        self.store(BARS[0] + DOORBELL, 1)
        return self.load(BARS[0] + STATUS)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    socket = tmp_path / "socket"
    with Backend([sys.executable, "-m", "pileus.vfio_user.devices.copy_engine", str(socket)], socket):
        yield socket


def test_it_finds_the_device_and_has_memory_copied(engine: Path) -> None:
    with Machine(engine, shared=True) as machine:
        assert machine.config(0) == 0x10F71AF4
        machine.place_bars()
        data = os.urandom(5000)
        machine.do(f"write {MIB:#x} {len(data)} 0x{data.hex()}")
        assert machine.copy(MIB, 2 * MIB + 3, len(data)) == DONE
        assert bytes.fromhex(machine.do(f"read {2 * MIB + 3:#x} {len(data)}")[2:]) == data
        assert machine.copy(MIB, MEMORY, 16) == FAILED
        assert machine.load(BARS[0] + COUNT) == 2
        machine.store(BARS[2] + 16, 0x12345678)  # mapped: the device is not asked
        assert machine.load(BARS[2] + 16) == 0x12345678


def test_the_next_client_finds_the_device_reset(engine: Path) -> None:
    for _ in range(2):
        with Machine(engine, shared=True) as machine:
            machine.place_bars()
            assert machine.load(BARS[0] + COUNT) == 0
            assert machine.copy(0, MIB, 16) == DONE

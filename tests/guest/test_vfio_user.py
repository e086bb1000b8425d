"""A device in Python, of another process, as a stock kernel and a driver in its user space find it.

The driver is a few lines of shell: busybox's devmem reaches the BARs, and RAM that the kernel was told not to
use (mem=); uio_pci_generic tells of the pin.
"""

import lzma
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import ASSETS, TRIXIE_PVH, Guest
from tests.listening import await_listener

MIB = 1 << 20
CMDLINE = "console=ttyS0 quiet mem=384M iomem=relaxed"
SPARE = 400 * MIB  # RAM that the guest's kernel leaves alone, of 512 MiB
SOURCE, TARGET, LENGTH, STATUS, DOORBELL, COUNT = 0x00, 0x08, 0x10, 0x14, 0x18, 0x1C
DONE, FAILED = 1, 2
ENGINE = "PCI_ID=1AF4:10F7"
pytestmark = pytest.mark.needs("--user-device")


class Engine:
    """The copy engine in a process of its own."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        command = [sys.executable, "-m", "pileus.vfio_user.devices.copy_engine", str(socket)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        await_listener(self.process, socket)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path / "engine.socket")
    yield engine
    engine.stop()


Boot = Callable[..., "Driver"]


@pytest.fixture
def boot(start: StartGuest, engine: Engine, tmp_path: Path) -> Boot:
    def boot(*options: str) -> Driver:
        """A guest at its shell, with the modules of uio in /."""
        modules = {}
        for name in ("uio", "uio_pci_generic"):
            (module,) = (ASSETS / "trixie/lib/modules").glob(f"*/kernel/drivers/uio/{name}.ko*")
            data = module.read_bytes()
            modules[f"{name}.ko"] = lzma.decompress(data) if module.suffix == ".xz" else data
        guest: Guest = start(
            "--user-device",
            f"socket={engine.socket},id=copier",
            *options,
            do="shell",
            cmdline=CMDLINE,
            initramfs=with_files(TRIXIE_PVH.initramfs, modules, tmp_path / "initramfs.cpio"),
        )
        guest.shell()
        return Driver(guest)

    return boot


def with_files(initramfs: Path, files: dict[str, bytes], target: Path) -> Path:
    """An initramfs like ``initramfs`` with ``files`` in its root, by name."""
    parts = [initramfs.read_bytes()]
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        fields = (number, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % each for each in fields) + name.encode() + b"\0"
        parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]
    target.write_bytes(b"".join(parts))
    return target


class Driver:
    """What a driver does, typed into the guest's shell."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        found = guest.run(
            f"grep -l {ENGINE} /sys/bus/pci/devices/*/uevent"  # a line the terminal needs not wrap
        )
        match = re.search(r"(/sys/\S+)/uevent", found)
        assert match is not None, found
        self.path = match[1]
        lines = guest.run(f"echo 1 >{self.path}/enable; cat {self.path}/resource").splitlines()
        self.bars = [int(line.split()[0], 16) for line in lines if line.startswith("0x")]

    def load(self, gpa: int, bits: int = 32) -> int:
        return int(self.guest.run(f"busybox devmem {gpa:#x} {bits}"), 16)

    def store(self, gpa: int, value: int, bits: int = 32) -> None:
        self.guest.run(f"busybox devmem {gpa:#x} {bits} {value:#x}")

    def start(self, source: int, target: int, length: int) -> None:
        base = self.bars[0]
        self.store(base + SOURCE, source, 64)
        self.store(base + TARGET, target, 64)
        self.store(base + LENGTH, length)
        self.store(base + DOORBELL, 1)

    def status(self) -> int:
        return self.load(self.bars[0] + STATUS)

    def power_off(self) -> None:
        self.guest.type("poweroff -f\n")
        assert self.guest.wait() == 0


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_a_driver_has_memory_copied_and_hears_of_it(boot: Boot, irqchip: str) -> None:
    driver = boot("--irqchip", irqchip)
    guest = driver.guest
    for at, word in enumerate((0x11223344, 0x55667788, 0x99AABBCC)):
        driver.store(SPARE + 4 * at, word)
    guest.run("insmod /uio.ko; insmod /uio_pci_generic.ko")
    guest.run('echo "1af4 10f7" >/sys/bus/pci/drivers/uio_pci_generic/new_id')
    # In a shell of its own: this one would print a line when it is done.
    guest.run("(dd if=/dev/uio0 bs=4 count=1 2>/dev/null | xxd -p >/tmp/interrupts &)")
    driver.start(SPARE, SPARE + MIB, 12)
    assert [driver.load(SPARE + MIB + 4 * at) for at in range(4)] == [0x11223344, 0x55667788, 0x99AABBCC, 0]
    assert driver.status() == DONE
    assert "01000000" in guest.run("until [ -s /tmp/interrupts ]; do usleep 50000; done; cat /tmp/interrupts")
    assert "IO-APIC" in guest.run("grep uio_pci_generic /proc/interrupts")
    driver.start(1 << 40, SPARE, 12)
    assert driver.status() == FAILED
    driver.store(driver.bars[2] + 64, 0xCAFE)  # memory of the device, without an exit
    assert driver.load(driver.bars[2] + 64) == 0xCAFE
    driver.power_off()


def test_a_server_that_is_killed_costs_the_device_only(boot: Boot, engine: Engine) -> None:
    driver = boot()
    assert driver.status() == 0
    engine.process.send_signal(signal.SIGSTOP)  # it hangs, first
    engine.process.kill()
    engine.process.wait()
    assert driver.status() == 0xFFFFFFFF
    driver.start(SPARE, SPARE + MIB, 4)
    assert driver.guest.run("echo ali''ve") == "alive"
    assert driver.guest.log.count("from now on the device does not answer") == 1
    driver.power_off()


def test_a_reboot_finds_the_device_as_at_first(boot: Boot, engine: Engine) -> None:
    driver = boot()
    driver.start(SPARE, SPARE + MIB, 4)
    assert driver.load(driver.bars[0] + COUNT) == 1
    driver.guest.type("reboot -f\n")
    driver.guest.shell()
    again = Driver(driver.guest)
    assert again.load(again.bars[0] + COUNT) == 0
    again.start(SPARE, SPARE + MIB, 4)
    assert again.status() == DONE
    again.power_off()

"""Whole VMs, from the command line to their end, with kernels of a few bytes on the real /dev/kvm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import tiny

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, str(ROOT / "bin" / "pileus")]
pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
TIMEOUT = 30


class Command:
    """The command ``pileus`` with a kernel of some bytes, its serial port in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.serial = folder / "serial"
        self.env = os.environ | {"PILEUS_ANY_KVM": "1", "PYTHONPATH": str(ROOT / "src")}

    def words(self, code: bytes, *more: str, pvh: bool = True, serial: str = "") -> list[str]:
        kernel = self.folder / "kernel"
        kernel.write_bytes(tiny.elf(code, pvh=pvh))
        return [*PROGRAM, "--kernel", str(kernel), "--serial", serial or f"file={self.serial}", *more]

    def run(self, code: bytes, *more: str, pvh: bool = True) -> subprocess.CompletedProcess[str]:
        words = self.words(code, *more, pvh=pvh)
        return subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=self.folder
        )

    def said_a(self) -> bool:
        return self.serial.exists() and self.serial.read_bytes() == b"A"

    def start(self, code: bytes, serial: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.words(code, serial=serial), env=self.env, stdout=subprocess.DEVNULL)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.mark.parametrize("pvh", [True, False], ids=["pvh", "64-bit entry"])
def test_power_off_ends_with_status_0(command: Command, pvh: bool) -> None:
    result = command.run(tiny.SAY_A + tiny.POWER_OFF, pvh=pvh)
    assert (result.returncode, result.stderr) == (0, "")
    assert command.serial.read_bytes() == b"A"


@pytest.mark.parametrize("reset", [tiny.ACPI_RESET, tiny.I8042_RESET], ids=["acpi", "i8042"])
def test_a_reset_boots_again_in_the_same_process(command: Command, reset: bytes) -> None:
    ram = command.folder / "ram"
    ram.touch()
    code = tiny.power_off_on_boot(3, reset)
    result = command.run(code, "--memory", f"size=16M,file={ram}", "-vv")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the guest asked for a reset") == 2
    assert ram.read_bytes()[tiny.COUNTER] == 3
    assert command.serial.read_bytes() == b"A", "the file begins anew with each boot"


def test_a_triple_fault_is_told_and_resets(command: Command) -> None:
    ram = command.folder / "ram"
    ram.touch()
    result = command.run(tiny.power_off_on_boot(3, tiny.TRIPLE_FAULT), "--memory", f"size=16M,file={ram}")
    assert result.returncode == 0
    assert result.stderr.count("the guest ended in a triple fault, vCPU 0") == 2
    assert result.stderr.count("it is reset\n") == 2
    assert ram.read_bytes()[tiny.COUNTER] == 3


def test_a_guest_that_is_off_cannot_reset(command: Command) -> None:
    for _ in range(5):  # who is first, the guest or the control loop, differs from run to run
        result = command.run(tiny.SAY_A + tiny.POWER_OFF_THEN_RESET, "-vv")
        assert result.returncode == 0
        assert "asked for a reset" not in result.stderr
        assert command.serial.read_bytes() == b"A", "no second boot has emptied the file"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_128_and_its_number(command: Command, number: signal.Signals) -> None:
    process = command.start(tiny.SAY_A + tiny.SPIN)
    try:
        tiny.wait_until(command.said_a)
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 128 + number
        assert sorted(os.listdir(command.folder)) == ["kernel", "serial"]
    finally:
        process.kill()
        process.wait()


def test_a_socket_is_gone_when_the_process_is(command: Command) -> None:
    path = command.folder / "socket"
    process = command.start(tiny.SPIN, serial=f"socket={path}")
    try:
        tiny.wait_until(path.exists)
        process.terminate()
        assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def test_two_vms_at_once(tmp_path: Path) -> None:
    commands = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        commands.append(Command(tmp_path / name))
    processes = [each.start(tiny.SAY_A + tiny.SPIN) for each in commands]
    try:
        tiny.wait_until(lambda: all(each.said_a() for each in commands))
        assert [process.poll() for process in processes] == [None, None]
        processes[0].terminate()
        assert processes[0].wait(TIMEOUT) == 128 + signal.SIGTERM
        assert processes[1].poll() is None, "the other one goes on"
        processes[1].terminate()
        assert processes[1].wait(TIMEOUT) == 128 + signal.SIGTERM
    finally:
        for process in processes:
            process.kill()
            process.wait()


def children(process: int) -> list[str]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


def test_a_vm_is_one_process(command: Command) -> None:
    process = command.start(tiny.SAY_A + tiny.SPIN)
    try:
        tiny.wait_until(command.said_a)
        assert children(process.pid) == []
    finally:
        process.kill()
        process.wait()


WRONG = {
    "too many vCPUs": (["--kernel", "KERNEL", "--cpus", "4096,max=4096"], "--cpus 4096"),
    "missing kernel": (["--kernel", "missing"], "--kernel missing: "),
    "a kernel of no known kind": (["--kernel", "NOISE"], "--kernel "),
    "a folder for a kernel": (["--kernel", "."], "--kernel .: is a directory"),
    "missing initramfs": (["--kernel", "KERNEL", "--initramfs", "missing"], "--initramfs missing: "),
    "initramfs too big": (
        ["--kernel", "KERNEL", "--memory", "16M", "--initramfs", "BIG"],
        "--initramfs",
    ),
    "no such backing": (["--kernel", "KERNEL", "--memory", "file=/dev/null"], "--memory file /dev/null: "),
    "serial nowhere": (["--kernel", "KERNEL", "--serial", "file=/no/where"], "/no/where: No such file"),
    "log nowhere": (["--kernel", "KERNEL", "--log-file", "/no/where"], "--log-file /no/where: "),
}


@pytest.mark.parametrize(("words", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_one_sentence_and_status_1(
    command: Command, words: list[str], sentence: str
) -> None:
    kernel, big, noise = (command.folder / name for name in ("tiny", "big", "noise"))
    noise.write_bytes(bytes(range(256)) * 64)
    kernel.write_bytes(tiny.elf(tiny.POWER_OFF))
    with big.open("wb") as file:
        file.truncate(32 << 20)
    named = {"KERNEL": str(kernel), "BIG": str(big), "NOISE": str(noise)}
    result = subprocess.run(
        [*PROGRAM, *[named.get(word, word) for word in words]],
        env=command.env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        cwd=command.folder,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("pileus: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr
    assert sorted(os.listdir(command.folder)) == ["big", "noise", "tiny"]


FAILURE_CHECK = """
import os, sys, _thread
from pileus.cli.args import scan
from pileus.cli.main import configure
from pileus.cli.options import OPTIONS
from pileus.errors import ConfigError
from pileus.vmm.vmm import run

stack = _thread.stack_size()
config = configure(scan(sys.argv[1:], OPTIONS))
def held():
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(list(maps))
counts = []
for round in range(30):
    config.vm.payload.kernel = "missing"
    try:
        run(config)
    except ConfigError:
        counts.append(held())
assert len(counts) == 30
assert counts[4][:2] == counts[-1][:2], counts
assert counts[-1][2] <= counts[4][2] + 4, counts
config.vm.payload.kernel = sys.argv[2]
assert run(config) == 0
assert _thread.stack_size() == stack
"""


def test_thirty_builds_that_fail_leave_nothing_and_the_next_one_runs(command: Command) -> None:
    words = command.words(tiny.POWER_OFF, "--cpus", "4")[len(PROGRAM) :]
    result = subprocess.run(
        [sys.executable, "-c", FAILURE_CHECK, *words],
        env=command.env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        cwd=command.folder,
    )
    assert result.returncode == 0, result.stderr

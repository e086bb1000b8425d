"""What each event means for the VM, with whole VMs in this process."""

import fcntl
import os
import signal
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pileus import log
from pileus.config.model import BalloonConfig, ConsoleConfig, VmConfig, VmmConfig
from pileus.console.pty import PtyConsole
from pileus.devices.i8042 import I8042
from pileus.errors import ConfigError, HostError
from pileus.kvm.probe import OVERRIDE
from pileus.virtio.devices.console import ConsoleDevice
from pileus.vm.vcpu import FAULT, POWER_OFF, RESET, Event
from pileus.vmm.vmm import Vmm
from pileus.vmm.vmm import run as run_vmm
from tests.unit import tiny

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
PATIENCE = 30  # seconds


@pytest.fixture(autouse=True)
def any_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "1")


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """What the log says, from level info on."""
    path = tmp_path / "log"
    log.setup(log.INFO, str(path))
    yield path.read_text
    os.close(log._fd)
    log._fd, log.level = log.STDERR, log.ERROR
    log._limits.clear()


def winsize(columns: int, rows: int) -> bytes:
    return struct.pack("HHHH", rows, columns, 0, 0)


def live(config: VmConfig, meddle: Callable[[Vmm], None] = lambda _: None) -> int:
    """Run a VM to its end; ``meddle`` is called once it runs. Returns the exit status."""

    def give_up() -> None:
        vmm.status = -1
        vmm.loop.stop()

    vmm = Vmm()
    try:
        vmm.loop.after(PATIENCE, give_up)
        vmm.create(config)
        vmm.boot()
        meddle(vmm)
        vmm.loop.run()
    finally:
        vmm.close()
    return vmm.status


def happen(vmm: Vmm, kind: str) -> None:
    """The running VM reports an event of ``kind``."""
    vm = vmm._vm
    vmm.loop.post(lambda: vmm._happened(vm, Event(kind, "vCPU 0 at RIP 0x100000")))


@pytest.mark.parametrize("reset", [tiny.ACPI_RESET, tiny.I8042_RESET], ids=["acpi", "i8042"])
def test_thirty_reboots_leave_nothing(tmp_path: Path, reset: bytes) -> None:
    seen: list[tiny.Held] = []

    def watch(vmm: Vmm) -> None:
        build = vmm._build

        def rebuild() -> None:
            seen.append(tiny.held())  # the old VM is gone
            build()

        vmm._build = rebuild  # type: ignore[method-assign]

    config = tiny.config(tmp_path, tiny.power_off_on_boot(31, reset), cpus=3, file=True)
    assert live(config, watch) == 0
    assert len(seen) == 30
    assert set(seen[5:]) == {seen[5]}
    assert (tmp_path / "serial").read_bytes() == b"A", "the file begins anew with each boot"


def test_thirty_vms_one_after_the_other_leave_nothing(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, tiny.SAY_A + tiny.POWER_OFF, cpus=4)
    held = set()
    for count in range(30):
        assert live(config) == 0
        if count >= 5:
            held.add(tiny.held())
    assert len(held) == 1


def test_a_triple_fault_is_told_and_resets(tmp_path: Path, told: Callable[[], str]) -> None:
    """By a reported event: only a KVM on vmx or svm has real ones, which the guest tier meets."""
    vms: list[object] = []

    def fault(vmm: Vmm) -> None:
        vms.append(vmm._vm)
        happen(vmm, FAULT)
        vmm.loop.post(lambda: vms.append(vmm._vm))
        vmm.loop.post(vmm.loop.stop)

    assert live(tiny.config(tmp_path, tiny.SPIN), fault) == 0
    assert vms[0] is not vms[1] is not None
    assert "the guest ended in a triple fault, vCPU 0 at RIP 0x100000; it is reset" in told()


def test_a_device_that_raises_ends_with_1_and_its_traceback(
    tmp_path: Path, told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> int:
        raise ZeroDivisionError("of the device")

    monkeypatch.setattr(I8042, "read", broken)
    assert live(tiny.config(tmp_path, tiny.READ_I8042 + tiny.SPIN)) == 1
    assert "vCPU 0 at RIP 0x10000" in told()
    assert "touched a device that failed" in told()
    assert "ZeroDivisionError: of the device" in told()


def test_an_internal_error_of_kvm_ends_with_1_and_its_numbers(
    tmp_path: Path, told: Callable[[], str]
) -> None:
    assert live(tiny.config(tmp_path, tiny.SAY_A + tiny.ENTER_A_HOLE)) == 1
    assert "stopped: internal error (0x1" in told()
    assert "Traceback" not in told()
    assert (tmp_path / "serial").read_bytes() == b"A"


def test_a_panic_is_told_and_the_guest_goes_on(tmp_path: Path, told: Callable[[], str]) -> None:
    assert live(tiny.config(tmp_path, tiny.PANIC + tiny.SAY_A + tiny.POWER_OFF)) == 0
    assert "ERROR:" in told()
    assert "the guest reported a panic, to pvpanic" in told()
    assert (tmp_path / "serial").read_bytes() == b"A"


def test_a_guest_that_panics_all_the_time_is_bearable(tmp_path: Path, told: Callable[[], str]) -> None:
    again = bytes.fromhex("ebfd")  # to the out itself
    config = tiny.config(tmp_path, tiny.PANIC + again)
    waiting: list[int] = []

    def look(vmm: Vmm) -> None:
        waiting.append(len(vmm.loop._posted))
        if len(waiting) == 20:
            vmm.loop.stop()
        else:
            vmm.loop.after(0.01, lambda: look(vmm))

    assert live(config, look) == 0
    assert max(waiting) <= 1
    assert told().count("the guest reported a panic") == log.BURST


def test_a_power_off_is_final(tmp_path: Path, told: Callable[[], str]) -> None:
    """A kernel that tries one way after the other is not rebooted by the second."""
    code = tiny.SAY_A + tiny.POWER_OFF[:-1] + tiny.I8042_RESET

    def both(vmm: Vmm) -> None:
        happen(vmm, POWER_OFF)
        happen(vmm, RESET)

    assert live(tiny.config(tmp_path, code)) == 0
    assert live(tiny.config(tmp_path, tiny.SAY_A + tiny.SPIN), both) == 0
    assert told().count("the guest powered off") == 2
    assert "reset" not in told()


def test_what_a_vm_before_the_reboot_says_is_of_no_interest(tmp_path: Path, told: Callable[[], str]) -> None:
    def reset_twice(vmm: Vmm) -> None:
        happen(vmm, RESET)
        happen(vmm, RESET)
        vmm.loop.after(0.2, vmm.loop.stop)

    assert live(tiny.config(tmp_path, tiny.SPIN), reset_twice) == 0
    assert told().count("the guest asked for a reset") == 1


def test_a_kernel_that_vanished_before_the_reboot_is_named(tmp_path: Path) -> None:
    def vanish(vmm: Vmm) -> None:
        (tmp_path / "kernel").unlink()
        happen(vmm, RESET)

    before = tiny.held()
    with pytest.raises(ConfigError, match=r"--kernel .*: No such file"):
        live(tiny.config(tmp_path, tiny.SPIN), vanish)
    assert tiny.held().files == before.files
    assert tiny.held().threads == before.threads


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_a_signal_ends_with_its_number(
    tmp_path: Path, told: Callable[[], str], number: signal.Signals
) -> None:
    def twice(_: Vmm) -> None:
        signal.pthread_kill(threading.get_ident(), number)
        signal.pthread_kill(threading.get_ident(), number)

    assert live(tiny.config(tmp_path, tiny.SPIN, cpus=2), twice) == 128 + number
    assert f"ending on {number.name}" in told()


def test_two_vms_live_at_once_in_one_process(tmp_path: Path) -> None:
    statuses: dict[str, int] = {}
    threads = []
    before = tiny.held()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        code = tiny.power_off_on_boot(4, tiny.ACPI_RESET)
        config = tiny.config(tmp_path / name, code, cpus=2, file=True)

        def run(name: str = name, config: VmConfig = config) -> None:
            statuses[name] = live(config)

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {"one": 0, "two": 0}
    for name in statuses:
        assert (tmp_path / name / "serial").read_bytes() == b"A"
        assert (tmp_path / name / "ram").read_bytes()[tiny.COUNTER] == 4
    assert tiny.held()[:2] == before[:2]


def test_a_host_that_refuses_half_way_keeps_nothing(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, tiny.POWER_OFF)
    config.serial.file = str(tmp_path / "no" / "serial")
    before = tiny.held()
    with pytest.raises(HostError, match="/no/serial: No such file"):
        live(config)
    assert tiny.held()[:2] == before[:2]


def test_a_vmm_without_a_vm_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="--kernel is missing"):
        run_vmm(VmmConfig())


def test_a_virtio_console_stays_through_reboots_and_hears_of_its_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path, tiny.SPIN)
    config.console = ConsoleConfig(mode="pty")
    config.balloon = BalloonConfig(size=1 << 20, statistics=True)
    ports = []

    def meddle(vmm: Vmm) -> None:
        console = vmm._console
        assert isinstance(console, PtyConsole)
        ports.append(console._port)
        assert isinstance(ports[0], ConsoleDevice)
        assert ports[0].config[:4] == bytes(4)
        fcntl.ioctl(console._output, termios.TIOCSWINSZ, winsize(132, 43))
        os.kill(os.getpid(), signal.SIGWINCH)
        vmm.loop.after(0, lambda: happen(vmm, RESET))

        def after_the_reboot() -> None:
            if console._port is ports[0]:
                vmm.loop.after(0.01, after_the_reboot)
                return
            ports.append(console._port)
            happen(vmm, POWER_OFF)

        vmm.loop.after(0.01, after_the_reboot)

    assert live(config, meddle) == 0
    for port in ports:
        assert isinstance(port, ConsoleDevice)
        assert port.config[:4] == struct.pack("<HH", 132, 43)
    assert "\tConsole: /dev/pts/" in capfd.readouterr().out

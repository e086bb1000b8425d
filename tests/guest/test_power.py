"""Reboot, power off, and signals: the process's end is an orderly one each time."""

import signal

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import Guest


@pytest.mark.long
def test_two_reboots_then_power_off_in_one_process(start: StartGuest) -> None:
    guest: Guest = start(do="shell")
    for _ in range(2):
        guest.expect("pileus-init")
        guest.shell()
        guest.type("reboot -f\n")
    guest.expect("pileus-init")
    guest.shell()
    guest.type("poweroff -f\n")
    assert guest.wait() == 0
    assert guest.log.count("Userspace code 0x60") == 3


def test_a_reset_by_the_keyboard_controller_reboots(start: StartGuest) -> None:
    guest: Guest = start(do="shell", cmdline="console=ttyS0 quiet reboot=k")
    guest.shell()
    guest.type("reboot -f\n")
    guest.expect("pileus-init")
    guest.shell()
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


def test_a_triple_fault_is_reported_and_reboots(start: StartGuest) -> None:
    guest: Guest = start(do="shell", cmdline="console=ttyS0 quiet reboot=t")
    guest.shell()
    guest.type("reboot -f\n")
    guest.expect("pileus-init")
    assert "triple fault" in guest.log
    guest.shell()
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_during_boot_leaves_nothing_behind(start: StartGuest, number: signal.Signals) -> None:
    guest: Guest = start(do="idle", cmdline="console=ttyS0", cpus="2")
    guest.expect("Linux version")
    assert guest.terminal_is_raw()
    guest.signal(number)
    assert guest.wait(30) in (128 + number, -number)
    assert guest.terminal_is_sane()

"""Kernels and machines: what boots, and what the guest finds there."""

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import TRIXIE, TRIXIE_ELF, TRIXIE_PVH, Guest, Kernel

KERNELS = [
    Kernel("bullseye"),
    Kernel("bookworm"),
    TRIXIE,
    Kernel("sid"),
    TRIXIE_PVH,
    TRIXIE_ELF,
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_stock_kernel_boots_reports_and_powers_off(start: StartGuest, kernel: Kernel) -> None:
    guest: Guest = start(kernel=kernel)
    facts = guest.facts()
    assert guest.wait() == 0
    assert facts["kernel"] == kernel.release
    assert facts.number("cpus") == 1
    assert {"APIC", "DSDT", "FACP"} <= set(facts["acpi_tables"].split())
    assert facts["clocksource"] in ("kvm-clock", "tsc")
    assert "kernel entered" in guest.log
    assert "Userspace code 0x60" in guest.log


def test_all_vcpus_come_up(start: StartGuest) -> None:
    count = 8
    guest: Guest = start(cpus=str(count))
    facts = guest.facts()
    assert guest.wait() == 0
    assert facts.number("cpus") == count
    assert [int(number) for number in facts["apicids"].split()] == list(range(count))
    assert facts["cpus_online"] == f"0-{count - 1}"


def test_more_vcpus_are_possible_than_boot(start: StartGuest) -> None:
    guest: Guest = start(cpus="boot=1,max=4")
    facts = guest.facts()
    assert guest.wait() == 0
    assert facts.number("cpus") == 1
    assert facts["cpus_possible"] == "0-3"


def test_the_guest_sees_the_topology_asked_for(start: StartGuest) -> None:
    guest: Guest = start(cpus="boot=4,topology=2:1:1:2")
    facts = guest.facts()
    assert guest.wait() == 0
    topology = [facts[f"topology_cpu{cpu}"].split() for cpu in range(4)]
    assert [fields[0] for fields in topology] == ["package:0", "package:0", "package:1", "package:1"]
    assert [fields[-1] for fields in topology] == ["threads:0-1", "threads:0-1", "threads:2-3", "threads:2-3"]


def test_a_guest_that_panics_is_told_of_and_reset(start: StartGuest) -> None:
    guest: Guest = start(do="panic", terminal=True)
    guest.expect("pileus-init")
    guest.expect("Attempted to kill init")
    guest.expect("pileus-init")  # panic=-1 asked for a reset at once
    guest.process.terminate()
    guest.wait()
    assert "reset" in guest.log


def test_a_guest_with_a_pvpanic_driver_has_its_panic_reported(start: StartGuest) -> None:
    guest: Guest = start(do="panic", cmdline="console=ttyS0 quiet pileus.modules=pvpanic-mmio")
    guest.expect_log("the guest reported a panic")
    guest.expect_log("the guest asked for a reset")
    guest.process.terminate()
    guest.wait()

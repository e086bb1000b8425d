"""The PCI bus as a stock kernel finds it."""

import re

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import TRIXIE_PVH, Guest, Kernel

FUNCTION = re.compile(r"pci=0000:00:(\w\w)\.0 class:(\S+) vendor:(\S+) device:(\S+)")
KERNELS = [
    Kernel("bullseye"),
    pytest.param(Kernel("bookworm"), marks=pytest.mark.long),
    pytest.param(TRIXIE_PVH, marks=pytest.mark.long),
    Kernel("sid"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_host_bridge_and_a_virtio_device_in_each_slot(start: StartGuest, kernel: Kernel) -> None:
    guest: Guest = start(kernel=kernel)
    facts = guest.facts()
    assert guest.wait() == 0
    bridge, *devices = FUNCTION.findall(guest.output)
    assert bridge == ("00", "0x060000", "0x8086", "0x0d57")
    assert [slot for slot, *_ in devices] == [f"{slot:02x}" for slot in range(1, len(devices) + 1)]
    assert {vendor for _, _, vendor, _ in devices} == {"0x1af4"}
    assert "MCFG" in facts["acpi_tables"].split()
    assert [line for line in facts.dmesg if re.search(r"pci|BAR|ECAM|MMCONFIG", line)] == []


def test_the_old_mechanism_finds_the_same_without_acpi(start: StartGuest) -> None:
    guest: Guest = start(cmdline="console=ttyS0 quiet acpi=off")
    guest.facts()
    guest.process.kill()  # without ACPI it cannot power off
    guest.wait()
    assert FUNCTION.findall(guest.output)[0] == ("00", "0x060000", "0x8086", "0x0d57")
    assert len(FUNCTION.findall(guest.output)) > 1


def test_without_pci_there_is_no_bus(start: StartGuest) -> None:
    guest: Guest = start("--pci", "off")
    facts = guest.facts()
    assert guest.wait() == 0
    assert FUNCTION.findall(guest.output) == []
    assert "MCFG" not in facts["acpi_tables"].split()

"""--irqchip split: a stock kernel with an IOAPIC of pileus's, and local APICs of KVM's.

Level-triggered pins have their guest in test_vfio_user.py. PILEUS_TEST_IRQCHIP=split runs all others on it.
"""

import hashlib
from pathlib import Path

import pytest

from tests.guest.conftest import StartGuest
from tests.guest.guest import TRIXIE_PVH, Guest
from tests.guest.system import segment

pytestmark = pytest.mark.needs("--irqchip", "--disk")

MIB = 1 << 20


def test_what_is_typed_arrives_and_no_8259_is_there(start: StartGuest) -> None:
    guest: Guest = start("--irqchip", "split", do="shell", cpus="2")
    guest.shell()
    assert guest.run("nproc") == "2"
    assert "IO-APIC" in guest.run("grep ttyS0 /proc/interrupts")  # by which the command itself came
    assert guest.run("grep -c XT-PIC /proc/interrupts") == "0"
    # An interrupt goes where its mask says: the guest writes another message into the IOAPIC.
    number = guest.run("sed -n 's/^ *\\([0-9]*\\):.*ttyS0.*/\\1/p' /proc/interrupts")
    guest.run(f"echo 2 >/proc/irq/{number}/smp_affinity")
    counts = [int(guest.run(f"awk '$1 == \"{number}:\" {{ print $3 }}' /proc/interrupts")) for _ in range(2)]
    assert counts[1] > counts[0]
    guest.type("poweroff -f\n")
    assert guest.wait() == 0
    assert guest.terminal_is_sane()


def test_devices_without_pci_interrupt_through_it(start: StartGuest, folder: Path, tmp_path: Path) -> None:
    image = folder / "disk"
    data = bytes(range(256)) * 4096
    image.write_bytes(data + bytes(len(data)))
    script = """
grep virtio /proc/interrupts
echo "sum=$(dd if=/dev/vda bs=1M count=1 2>/dev/null | sha256sum | cut -c 1-64)"
dd if=/dev/vda of=/dev/vda bs=64k count=16 seek=16 conv=fsync 2>/dev/null
"""
    guest: Guest = start(
        "--irqchip", "split", "--pci", "off", "--disk", f"path={image}",
        do="script", cmdline="console=ttyS0 quiet pileus.modules=virtio",
        initramfs=segment(script, tmp_path, TRIXIE_PVH.initramfs),
    )  # fmt: skip
    text = guest.expect(r"script=\d+")
    assert guest.wait() == 0
    assert "IO-APIC" in text
    assert f"sum={hashlib.sha256(data).hexdigest()}" in text
    assert image.read_bytes() == data + data

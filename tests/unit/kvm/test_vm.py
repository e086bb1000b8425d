"""Slots, doorbells and interrupts of a real VM."""

import os
import select

import pytest

from pileus.bus import Bus
from pileus.errors import HostError, KvmError
from pileus.kvm import Kvm
from pileus.kvm._vcpu import KICKED
from pileus.kvm._vm import IOAPIC, LOG_DIRTY_PAGES, PIC_MASTER

from .conftest import RAM, Machine
from .test_vcpu import buses


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_written_pages_show_in_the_dirty_log(machine: Machine) -> None:
    machine.vm.set_memory(0, 0, RAM, machine.region.hva, LOG_DIRTY_PAGES)
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex("c606005001 e680"))  # mov byte [0x5000], 1
    bitmap = bytearray(RAM // 4096 // 8)
    machine.vm.dirty_log(0, bitmap)
    machine.run(ports, mmio)
    machine.vm.dirty_log(0, bitmap)
    assert int.from_bytes(bitmap, "little") >> 5 & 1
    machine.vm.dirty_log(0, bitmap)
    assert not any(bitmap)


def test_slots_that_overlap_are_refused_by_name(machine: Machine) -> None:
    with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION failed: File exists \(slot 1, 0x1000"):
        machine.vm.set_memory(1, 0, 0x1000, machine.region.hva)


@pytest.mark.parametrize(
    ("code", "rings"), [("b007 e640", True), ("b008 e640", False)], ids=["match", "other"]
)
def test_a_doorbell_with_a_datamatch_rings_for_its_value_only(
    machine: Machine, code: str, rings: bool
) -> None:
    fd = eventfd()
    machine.vm.add_ioeventfd(fd, 0x40, 1, value=7, pio=True)
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex(code + "e680"))
    assert machine.run(ports, mmio) == (KICKED, None)
    assert signalled(fd) == rings
    machine.vm.remove_ioeventfd(fd, 0x40, 1, value=7, pio=True)
    os.close(fd)


def test_an_mmio_doorbell_rings_without_an_exit(machine: Machine) -> None:
    fd = eventfd()
    machine.vm.add_ioeventfd(fd, 0x10FF04, 0)
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex("b8ffff 8ed8 c60614ff5a e680"))
    machine.run(ports, mmio)
    assert signalled(fd)
    assert 6 not in machine.vcpu.exits  # KVM_EXIT_MMIO
    os.close(fd)


@pytest.mark.usefixtures("complete_kvm")
def test_an_irqfd_raises_its_pin(machine: Machine) -> None:
    """Real mode: IRQ 4 of the PIC at its reset vector base; the handler leaves through port 0x80."""
    fd = eventfd()
    machine.vm.add_irqfd(fd, 4)
    machine.memory.write(0x24 * 4, bytes.fromhex("0030 0000"))  # vector 0x24 -> 0:0x3000
    machine.memory.write(0x3000, bytes.fromhex("b8adde e680"))
    # ICW1..4: base 0x20; unmask all; sti; hlt
    machine.load(bytes.fromhex("b011 e620 b020 e621 b004 e621 b001 e621 b000 e621 fb f4 ebfd"))
    ports, mmio, _ = buses(machine)
    os.eventfd_write(fd, 1)
    machine.run(ports, mmio)
    assert machine.vcpu.regs["rax"] & 0xFFFF == 0xDEAD
    machine.vm.remove_irqfd(fd, 4)
    os.close(fd)


def test_routes_take_pins_and_messages(machine: Machine) -> None:
    pins = [(gsi, IOAPIC, gsi) for gsi in range(24)]
    machine.vm.set_routing(pins, [(24, 0xFEE00000, 0x4051)])
    fd = eventfd()
    machine.vm.add_irqfd(fd, 24)
    os.close(fd)


def test_the_split_irqchip_leaves_the_local_apic_in_the_kernel(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.split_irqchip(24)
        vcpu = vm.create_vcpu(0)
        assert len(vcpu.get_part("lapic")) == 1024
        vcpu.close()


def test_controllers_give_and_take_their_state(machine: Machine) -> None:
    for chip in (PIC_MASTER, IOAPIC):
        state = machine.vm.irqchip_state(chip)
        machine.vm.restore_irqchip(state)
        assert machine.vm.irqchip_state(chip) == state


def test_the_clock_can_be_set(machine: Machine) -> None:
    machine.vm.clock = 5_000_000_000
    assert 5_000_000_000 <= machine.vm.clock < 15_000_000_000


def test_a_vcpu_id_in_use_is_named(machine: Machine) -> None:
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU .*APIC id 0"):
        machine.vm.create_vcpu(0)


def test_a_missing_device_is_named() -> None:
    with pytest.raises(HostError, match="cannot open /dev/no-such-kvm: No such file"):
        Kvm("/dev/no-such-kvm")


def test_what_is_not_kvm_is_told_by_its_ioctl() -> None:
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION failed"):
        Kvm("/dev/null")


def test_nothing_stays_open(kvm: Kvm) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        machine = Machine(kvm)
        machine.load(b"\xe6\x80")
        machine.run(buses(machine)[0], Bus("mmio"))
        machine.close()
    assert len(os.listdir("/proc/self/fd")) == before

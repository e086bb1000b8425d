"""A vCPU runs real instructions; its exits, registers and kicks are what the caller sees."""

import threading
import time

import pytest

from pileus.arch.x86_64 import layout, reset_vector
from pileus.bus import Bus, PythonDevice
from pileus.errors import KvmError
from pileus.kvm import Kvm
from pileus.kvm._vcpu import DEVICE_FAILED, KICKED, TRIPLE_FAULT

from .conftest import CODE, Machine

JMP_SELF = b"\xeb\xfe"


class Recorder(PythonDevice):
    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x1234567890ABCDEF

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class Kicker(PythonDevice):
    """A write to it takes the vCPU out of the guest."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def write(self, offset: int, size: int, value: int) -> None:
        self.machine.vcpu.kick()


def buses(machine: Machine) -> tuple[Bus, Bus, Recorder]:
    """Ports and MMIO with a recorder at port 0x10 and at 0xd0000000, and a kicker at port 0x80."""
    ports, mmio, device = Bus("ports"), Bus("mmio"), Recorder()
    ports.insert(0x10, 8, device)
    ports.insert(0x80, 1, Kicker(machine))
    return ports, mmio, device


def test_port_writes_reach_the_device_with_offset_size_and_value(machine: Machine) -> None:
    ports, mmio, device = buses(machine)
    machine.load(bytes.fromhex("b034 e611 b83412 e712 e680"))  # out 0x11, al; out 0x12, ax; out 0x80, al
    assert machine.run(ports, mmio) == (KICKED, None)
    assert device.written == [(1, 1, 0x34), (2, 2, 0x1234)]


def test_port_reads_get_the_low_bytes_of_the_answer(machine: Machine) -> None:
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex("e510 e680"))  # in ax, 0x10
    machine.run(ports, mmio)
    assert machine.vcpu.regs["rax"] & 0xFFFF == 0xCDEF


def test_a_port_where_nothing_is_reads_as_ones(machine: Machine) -> None:
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex("b80000 e530 e680"))
    machine.run(ports, mmio)
    assert machine.vcpu.regs["rax"] & 0xFFFF == 0xFFFF


def test_string_output_is_served_item_by_item(machine: Machine) -> None:
    ports, mmio, device = buses(machine)
    machine.memory.write(0x2000, b"pileus")
    machine.load(bytes.fromhex("be0020 b90600 ba1000 f3 6e e680"))  # rep outsb
    machine.run(ports, mmio)
    assert bytes(value for _, _, value in device.written) == b"pileus"


def test_memory_outside_ram_goes_to_the_mmio_bus(machine: Machine) -> None:
    ports, mmio, device = buses(machine)
    mmio.insert(0x10FF00, 0x100, device)
    # mov ax, 0xffff; mov ds, ax; mov byte [0xff14], 0x5a: linear 0x10ff04, beyond 1 MiB
    machine.load(bytes.fromhex("b8ffff 8ed8 c60614ff5a e680"))
    machine.run(ports, mmio)
    assert device.written == [(4, 1, 0x5A)]


def test_a_device_that_raises_ends_the_run_with_its_exception(machine: Machine) -> None:
    class Broken(PythonDevice):
        def write(self, offset: int, size: int, value: int) -> None:
            raise ZeroDivisionError("of the device")

    ports = Bus("ports")
    ports.insert(0x30, 1, Broken())
    machine.load(bytes.fromhex("e630"))
    reason, error = machine.run(ports, Bus("mmio"))
    assert reason == DEVICE_FAILED
    assert isinstance(error, ZeroDivisionError)


@pytest.mark.usefixtures("complete_kvm")
def test_a_triple_fault_is_told_as_one(machine: Machine) -> None:
    # An empty IDT in protected mode: lidt [0x2000]; cr0.pe = 1; int3 finds no handler, three times.
    machine.memory.write(0x2000, bytes(6))
    machine.load(bytes.fromhex("0f011e0020 0f20c0 6683c801 0f22c0 cc"))
    assert machine.run(Bus("ports"), Bus("mmio")) == (TRIPLE_FAULT, None)


def test_a_kick_ends_a_loop_without_exits(machine: Machine) -> None:
    machine.load(JMP_SELF)
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(machine.vcpu.run(Bus("ports"), Bus("mmio"))))
    thread.start()
    time.sleep(0.05)
    machine.vcpu.kick()
    thread.join(10)
    assert outcome == [(KICKED, None)]


def test_a_kick_before_the_run_is_not_lost(machine: Machine) -> None:
    machine.load(JMP_SELF)
    machine.vcpu.kick()
    assert machine.run(Bus("ports"), Bus("mmio")) == (KICKED, None)


def test_a_halted_vcpu_can_be_kicked(machine: Machine) -> None:
    machine.load(bytes.fromhex("f4"))
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(machine.vcpu.run(Bus("ports"), Bus("mmio"))))
    thread.start()
    time.sleep(0.05)
    machine.vcpu.kick()
    thread.join(10)
    assert outcome == [(KICKED, None)]


def test_a_kick_of_a_closed_vcpu_is_nothing(machine: Machine) -> None:
    machine.vcpu.close()
    machine.vcpu.kick()


def test_exits_are_counted(machine: Machine) -> None:
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex("e610 e610 e610 e680"))
    machine.run(ports, mmio)
    assert machine.vcpu.exits[2] == 4  # KVM_EXIT_IO
    assert machine.vcpu.entered_ns > 0


def test_a_state_put_into_another_vm_goes_on_where_it_was(machine: Machine, kvm: Kvm) -> None:
    ports, mmio, _ = buses(machine)
    machine.load(bytes.fromhex("bb0500 43 e680 43 43 e680"))  # mov bx, 5; inc; stop; inc; inc; stop
    machine.run(ports, mmio)
    saved = machine.vcpu.state(kvm.msr_indices())
    other = Machine(kvm)
    try:
        other.memory.write(CODE, machine.memory.read(CODE, 64))
        other.vcpu.restore(saved)
        ports, mmio, _ = buses(other)
        other.run(ports, mmio)
        assert other.vcpu.regs["rbx"] & 0xFFFF == 8
        assert other.vcpu.sregs["cs"] == saved["sregs"]["cs"]
    finally:
        other.close()


def test_every_part_of_the_state_survives_a_round_trip(machine: Machine, kvm: Kvm) -> None:
    before = machine.vcpu.state(kvm.msr_indices())
    machine.vcpu.restore(before)
    after = machine.vcpu.state(kvm.msr_indices())
    moving = {0x10, 0x6E0, 0x40000010, 0x40000020}  # the TSC, its deadline, and two clocks for Windows
    assert {k: v for k, v in before["msrs"].items() if k not in moving} == {
        k: v for k, v in after["msrs"].items() if k not in moving
    }
    for part in ("regs", "sregs", "xsave", "xcrs", "debugregs", "mp_state"):
        assert before[part] == after[part], part


def test_a_part_of_the_wrong_size_is_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match="1024 bytes"):
        machine.vcpu.set_part("lapic", b"short")


def test_an_msr_that_kvm_refuses_is_named(machine: Machine) -> None:
    with pytest.raises(KvmError, match="MSR 0xdeadbeef"):
        machine.vcpu.set_msrs({0x10: 0, 0xDEADBEEF: 1})


def test_the_reset_vector_writes_the_reset_register(machine: Machine) -> None:
    ((gpa, code),) = reset_vector.build()
    machine.memory.write(gpa, code)
    sregs = machine.vcpu.sregs
    sregs["cs"] |= {"base": 0xF0000, "selector": 0xF000}
    machine.vcpu.sregs = sregs
    machine.vcpu.regs = {"rip": gpa - 0xF0000, "rflags": 2}
    ports, power = Bus("ports"), Recorder()
    ports.insert(layout.PORT_POWER, 4, power)
    threading.Timer(0.1, machine.vcpu.kick).start()
    assert machine.run(ports, Bus("mmio")) == (KICKED, None)
    assert power.written == [(0, 1, 1)]

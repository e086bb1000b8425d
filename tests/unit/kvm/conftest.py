"""A real KVM VM with a page or two of code: no kernel, so that any /dev/kvm can run it."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pileus.bus import Bus
from pileus.kvm import Kvm, Vcpu, Vm
from pileus.memory import GuestMemory, Region

RAM = 1 << 20
CODE = 0x1000


class Machine:
    """One vCPU in real mode at CODE, with all controllers in the kernel."""

    def __init__(self, kvm: Kvm) -> None:
        self.vm: Vm = kvm.create_vm()
        fd = os.memfd_create("test-ram")
        os.ftruncate(fd, RAM)
        self.region = Region(fd, RAM)
        self.memory = GuestMemory([(0, self.region)])
        self.vm.set_identity_map_address(0xFFFBC000)
        self.vm.set_tss_address(0xFFFBD000)
        self.vm.create_irqchip()
        self.vm.set_memory(0, 0, RAM, self.region.hva)
        self.vcpu: Vcpu = self.vm.create_vcpu(0)

    def load(self, code: bytes) -> None:
        """Put ``code`` at CODE and point the vCPU there."""
        self.memory.write(CODE, code)
        sregs = self.vcpu.sregs
        sregs["cs"] |= {"base": 0, "selector": 0}
        self.vcpu.sregs = sregs
        self.vcpu.regs = {"rip": CODE, "rflags": 2, "rsp": 0x8000}

    def run(self, ports: Bus, mmio: Bus) -> tuple[str, Any]:
        """Vcpu.run, kicked after a time no test needs: a guest that hangs fails its test, not the run."""
        watchdog = threading.Timer(5, self.vcpu.kick)
        watchdog.start()
        try:
            return self.vcpu.run(ports, mmio)
        finally:
            watchdog.cancel()
            watchdog.join()

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        self.memory.close()


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def machine(kvm: Kvm) -> Iterator[Machine]:
    machine = Machine(kvm)
    yield machine
    machine.close()

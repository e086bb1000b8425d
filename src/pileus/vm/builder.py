"""Makes a VM of its configuration: the one place where the parts of a machine are wired together."""

import os
import select

from pileus import log
from pileus.arch.x86_64 import layout, mptable, msr, regs, reset_vector
from pileus.arch.x86_64.acpi import tables
from pileus.arch.x86_64.acpi.machine import Machine
from pileus.arch.x86_64.cpuid import Template
from pileus.arch.x86_64.topology import Topology
from pileus.boot.loader import PVH, load
from pileus.bus import Bus
from pileus.cleanup import Cleanup
from pileus.devices.debug_port import DebugPort
from pileus.devices.ged import Ged
from pileus.devices.i8042 import I8042
from pileus.devices.power import Power
from pileus.devices.pvpanic import CRASH_LOADED, PANICKED, SHUTDOWN, PvPanic
from pileus.devices.rtc import Rtc
from pileus.devices.serial import Serial
from pileus.errors import ConfigError
from pileus.kvm.routing import Routes
from pileus.kvm.slots import Slots
from pileus.memory import GuestMemory, backing
from pileus.vm import devices
from pileus.vm.vcpu import CRASH, POWER_OFF, RESET, Event, VcpuThread
from pileus.vm.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pileus.config.model import CpusConfig, VmConfig
    from pileus.console import Console
    from pileus.kvm import Kvm, Vcpu
    from pileus.virtio.device import VirtioDevice
    from pileus.vm.lines import Lines
    from pileus.vm.mmio_devices import MmioDevices
    from pileus.vm.offloaded import Offloaded
    from pileus.vm.pci_devices import PciDevices
    from pileus.vm.persistent import PersistentMemory
    from pileus.vm.vm import Loop

    Carrier = MmioDevices | PciDevices

READABLE = select.EPOLLIN
LAST_SHORT_APIC_ID = 254  # 255 addresses all; beyond, KVM and the guest must agree on 32 bits


def build(
    config: "VmConfig",
    kvm: "Kvm",
    console: "Console | None",
    report: "Callable[[Event], None]",
    loop: "Loop",
    virtio_console: "Console | None" = None,
    *,
    events: bool = False,
    notice: "Callable[[str, str], None] | None" = None,
    more: "Sequence[Callable[[], VirtioDevice]]" = (),
) -> Vm:
    """A VM ready to start; nothing of it is left if this raises (PileusError).

    ``console`` is the far end of the serial port, None for no serial port; likewise ``virtio_console``.
    ``report`` gets what the guest does to the VM as a whole, on a vCPU's thread. ``loop`` serves the devices
    written in Python. With ``events`` the guest has a power button; it costs a pin of the IOAPIC, and so a
    line of the guest's /proc/interrupts, where release 0.3 had none. ``notice`` hears of a device, by its
    name, in a word: activated, reset, backend-lost, backend-back; on any thread. ``more`` make devices beside
    those of the configuration, in the slots after these.
    """
    cleanup = Cleanup()
    try:
        return _Builder(
            config, kvm, console, virtio_console, report, loop, cleanup, events, notice, more
        ).build()
    except BaseException:
        cleanup.close()
        raise


class _Builder:
    def __init__(
        self,
        config: "VmConfig",
        kvm: "Kvm",
        console: "Console | None",
        virtio_console: "Console | None",
        report: "Callable[[Event], None]",
        loop: "Loop",
        cleanup: Cleanup,
        events: bool,
        notice: "Callable[[str, str], None] | None",
        more: "Sequence[Callable[[], VirtioDevice]]",
    ) -> None:
        self.config = config
        self.kvm = kvm
        self.console = console
        self.virtio_console = virtio_console
        self.report = report
        self.loop = loop
        self.cleanup = cleanup
        self.events = events
        self.notice = notice
        self.more = more
        self.ged: Ged | None = None
        self.end_of_interrupt: Callable[[int], None] | None = None
        self.ports = Bus("ports")
        self.mmio = Bus("mmio")

    def build(self) -> Vm:
        topology = topology_of(self.config.cpus, self.kvm)
        self.offloaded = self._begin_offloaded()
        self.vm = self.cleanup.own(self.kvm.create_vm())
        memory = self._add_memory()
        long_apic_ids = topology.apic_id(self.config.cpus.max - 1) > LAST_SHORT_APIC_ID
        self._add_irqchip(long_apic_ids)
        self._add_devices()
        vcpus = self._add_vcpus(topology, long_apic_ids)
        self.persistent = self._add_persistent_memory(memory)
        carrier = self._add_virtio_devices(memory)
        self._load(memory, vcpus[0], topology, carrier)
        affinity = self.config.cpus.affinity or {}
        threads = [
            VcpuThread(
                *(index, vcpu, self.ports, self.mmio, self.report, affinity.get(index)),
                end_of_interrupt=self.end_of_interrupt,
            )
            for index, vcpu in enumerate(vcpus)
        ]
        return Vm(memory, threads, (self.ports, self.mmio), self.cleanup, self.devices, self.ged)

    def _begin_offloaded(self) -> "Offloaded | None":
        if not self.config.has_offloaded:
            return None
        from pileus.vm.offloaded import Offloaded

        return Offloaded(self.config, self.loop, self.cleanup)

    def _add_memory(self) -> GuestMemory:
        ranges = layout.ram_ranges(self.config.memory.size)
        memory = backing.allocate(self.config.memory, ranges, shared=self.config.has_backends)
        self.cleanup.own(memory)
        for slot, (gpa, region) in enumerate(memory.regions):
            self.vm.set_memory(slot, gpa, region.size, region.hva)
        return memory

    def _add_persistent_memory(self, memory: GuestMemory) -> "list[PersistentMemory]":
        if not self.config.pmem:
            return []
        from pileus.vm import persistent

        return persistent.add(self.config, memory, self.vm, self.mmio, self.phys_bits, self.cleanup)

    def _add_irqchip(self, long_apic_ids: bool) -> None:
        """All controllers in the kernel, or all but the IOAPIC and its elders.

        A timer chip is needed only where the local APIC's is not enough; KVM's needs its 8259s.
        """
        if long_apic_ids:
            self.vm.enable_x2apic_ids()
        self.vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
        self.vm.set_tss_address(layout.KVM_TSS)
        if is_split(self.config.irqchip, self.kvm, long_apic_ids):
            from pileus.vm.lines import SplitLines

            self.vm.split_irqchip(layout.IOAPIC_PINS)
            self.routes = Routes(self.vm, layout.GSI_FIRST_MSI, pins=())
            split = SplitLines(self.vm, self.routes, self.mmio, self.loop)
            self.lines: Lines = split
            self.end_of_interrupt = split.ioapic.end_of_interrupt
            return
        self.vm.create_irqchip()
        if not self.kvm.has_tsc_deadline:
            self.vm.create_pit()
        self.routes = Routes(self.vm, layout.GSI_FIRST_MSI)
        self.lines = self.vm

    def _add_devices(self) -> None:
        report = self.report
        power = Power(
            reset=lambda: report(Event(RESET, "by ACPI")),
            power_off=lambda: report(Event(POWER_OFF, "by ACPI")),
        )
        self.ports.insert(layout.PORT_I8042, 5, I8042(lambda: report(Event(RESET, "by the i8042"))))
        self.ports.insert(layout.PORT_CMOS, 2, Rtc(self.config.memory.size))
        self.ports.insert(layout.PORT_DEBUG, 1, DebugPort(log.debug))
        self.ports.insert(layout.PORT_POWER, 4, power)
        self.ports.insert(layout.PORT_PVPANIC, 1, PvPanic(self._panicked))
        if self.events:
            self.ged = Ged(self._irqfd(layout.GSI_GED))
            self.ports.insert(layout.PORT_GED, 1, self.ged)
        if self.console is not None:
            self._add_serial(self.console)

    def _irqfd(self, gsi: int) -> int:
        """A call fd that raises ``gsi``."""
        call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.cleanup.call(lambda: os.close(call_fd))
        self.lines.add_irqfd(call_fd, gsi)
        return call_fd

    def _panicked(self, bits: int) -> None:
        """The guest panicked, and perhaps a kernel of its own will look into that; or it shuts down."""
        if bits & (PANICKED | CRASH_LOADED):
            self.report(Event(CRASH, "to pvpanic" + (" and dumps itself" if bits & CRASH_LOADED else "")))
        elif bits & SHUTDOWN:
            self.report(Event(POWER_OFF, "by pvpanic"))

    def _add_serial(self, console: "Console") -> None:
        serial = self.cleanup.own(Serial(console.sink, self._irqfd(layout.GSI_COM1)))
        self.ports.insert(layout.PORT_COM1, 8, serial)
        console.connect(serial)
        self.cleanup.call(console.disconnect)

    def _add_virtio_devices(self, memory: GuestMemory) -> "Carrier":
        """Devices are made before what carries them, so that they outlive it on the way down."""
        made = devices.make(
            self.config, self.cleanup, self.virtio_console, self.loop, self.persistent, self.offloaded
        )
        self.devices = [*made, *(self.cleanup.own(make()) for make in self.more)]
        carrier = self._carrier(memory)
        for device in self.devices:
            if (notice := self.notice) is not None:
                device.noticed = lambda what, name=device.name: notice(name, what)  # type: ignore[misc]
            carrier.add(device)
            for index in device.python_queues:
                self._serve(device, index)
        if self.config.devices or self.config.user_devices:
            from pileus.vm import pass_through

            pass_through.add(self.config, carrier, memory, self.loop)
        return carrier

    def _carrier(self, memory: GuestMemory) -> "Carrier":
        slots = Slots(self.vm, len(memory.regions) + len(self.persistent))
        used_end = max((each.gpa + each.size for each in self.persistent), default=0)
        above_4g = layout.pci_mmio_64bit(self.config.memory.size, self.phys_bits, used_end)
        if not self.config.pci:
            from pileus.vm.mmio_devices import MmioDevices

            return MmioDevices(self.vm, self.lines, self.mmio, memory, self.cleanup, slots, above_4g)
        from pileus.vm.pci_devices import PciDevices

        iommu = None
        if self.config.has_iommu:
            from pileus.virtio.devices.iommu import IommuDevice

            iommu = next(device for device in self.devices if isinstance(device, IommuDevice))
        return PciDevices(
            self.vm,
            self.routes,
            self.lines,
            self.ports,
            self.mmio,
            memory,
            above_4g,
            self.cleanup,
            slots,
            iommu,
        )

    def _serve(self, device: "VirtioDevice", index: int) -> None:
        """Kicks of a queue that Python handles go to the control loop."""
        fd = device.queues[index].kick_fd

        def kicked(_events: int) -> None:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return  # a vCPU has reset the device meanwhile
            device.kicked(index)

        self.loop.watch(fd, READABLE, kicked)
        self.cleanup.call(lambda: self.loop.unwatch(fd))

    def _add_vcpus(self, topology: Topology, long_apic_ids: bool) -> "list[Vcpu]":
        vcpus = [
            self.cleanup.own(self.vm.create_vcpu(topology.apic_id(index)))
            for index in range(self.config.cpus.boot)
        ]
        template = Template(
            self.kvm.supported_cpuid(),
            topology,
            tsc_khz=vcpus[0].tsc_khz,
            tsc_deadline=self.kvm.has_tsc_deadline,
            max_phys_bits=self.config.cpus.max_phys_bits,
            long_apic_ids=long_apic_ids,
        )
        self.phys_bits = template.phys_bits
        msrs = msr.boot_msrs()
        for index, vcpu in enumerate(vcpus):
            vcpu.set_cpuid(template.for_vcpu(index))
            vcpu.set_msrs(msrs)
            regs.reset_fpu(vcpu)
            if long_apic_ids:
                regs.enable_x2apic(vcpu)
            regs.wire_local_interrupts(vcpu)
        return vcpus

    def _load(self, memory: GuestMemory, vcpu: "Vcpu", topology: Topology, carrier: "Carrier") -> None:
        """Kernel, boot data and tables into memory, and the boot vCPU to the kernel's entry."""
        payload = self.config.payload
        cmdline = " ".join(filter(None, (payload.cmdline, *carrier.cmdline)))
        entry = load(memory, payload.kernel or "", cmdline, payload.initramfs)
        boot, most = self.config.cpus.boot, self.config.cpus.max
        apic_ids = [topology.apic_id(index) for index in range(most)]
        serial = self.console is not None
        machine = Machine(
            apic_ids,
            boot,
            serial=serial,
            events=self.events,
            devices=carrier.aml,
            tables=carrier.tables,
            mmconfig=carrier.mmconfig,
        )
        if nvdimms := [each.nvdimm for each in self.persistent if each.nvdimm is not None]:
            from pileus.arch.x86_64.acpi import nfit

            machine.devices = [*machine.devices, nfit.root_device(nvdimms)]
            machine.tables = [*machine.tables, nfit.table(nvdimms)]
        for gpa, table in tables.build(machine) + mptable.build(apic_ids[:boot]) + reset_vector.build():
            memory.write(gpa, table)
        pvh = entry.protocol == PVH
        regs.write_boot_tables(memory, pvh)
        regs.enter(vcpu, pvh, entry.rip, rsi=entry.rsi, rbx=entry.rbx)


def is_split(irqchip: str | None, kvm: "Kvm", long_apic_ids: bool) -> bool:
    """Whether KVM has local APICs only, as ``irqchip`` asks for or, if it is None, as long APIC ids need.

    KVM's own IOAPIC has 8 bits for a destination. Raises ConfigError for what cannot be.
    """
    if irqchip == "kernel" and long_apic_ids:
        raise ConfigError("--irqchip", irqchip, f"APIC ids above {LAST_SHORT_APIC_ID} need split")
    if irqchip != "split" and not long_apic_ids:
        return False
    if not (kvm.has_split_irqchip and kvm.has_tsc_deadline):
        lacking = "TSC deadline timer" if kvm.has_split_irqchip else "split irqchip"
        raise ConfigError("--irqchip", "split", f"this host's KVM has no {lacking}")
    return True


def topology_of(cpus: "CpusConfig", kvm: "Kvm") -> Topology:
    """The topology asked for, or one package with a core per vCPU. Raises ConfigError beyond KVM's limits."""
    most = cpus.max
    if most > kvm.max_vcpus:
        raise ConfigError("--cpus", most, f"at most {kvm.max_vcpus} vCPUs are possible on this host")
    wanted = cpus.topology
    topology = Topology(1, most, 1, 1) if wanted is None else Topology(*wanted)
    if topology.apic_id(most - 1) >= kvm.max_vcpu_id:
        raise ConfigError("--cpus topology", wanted, f"its APIC ids pass {kvm.max_vcpu_id - 1}, KVM's last")
    return topology

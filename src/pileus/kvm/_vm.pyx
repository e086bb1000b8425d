"""A VM: memory slots, interrupt controllers and routes, doorbells, the guest's clock."""

import os

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from pileus.kvm cimport _uapi
from pileus.kvm._ioctl cimport call, call_value
from pileus.errors import KvmError
from pileus.kvm._vcpu import Vcpu

LOG_DIRTY_PAGES = _uapi.KVM_MEM_LOG_DIRTY_PAGES
READONLY = _uapi.KVM_MEM_READONLY
PIC_MASTER = _uapi.KVM_IRQCHIP_PIC_MASTER
PIC_SLAVE = _uapi.KVM_IRQCHIP_PIC_SLAVE
IOAPIC = _uapi.KVM_IRQCHIP_IOAPIC


cdef _with_note(error, note):
    """``error`` again, saying also what for."""
    return KvmError(error.name, error.errno, note)


cdef class Vm:
    """The fd of one VM. ``close`` it after its vCPUs, when their threads have ended."""

    cdef readonly int fd
    cdef readonly size_t vcpu_mmap_size

    def __cinit__(self, int fd, size_t vcpu_mmap_size):
        self.fd = fd
        self.vcpu_mmap_size = vcpu_mmap_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def extension(self, int capability):
        """As Kvm.extension, for this VM."""
        return call_value(self.fd, _uapi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def enable_capability(self, uint32_t capability, uint64_t argument=0):
        """KVM API §4.37."""
        cdef _uapi.kvm_enable_cap request
        memset(&request, 0, sizeof(request))
        request.cap = capability
        request.args[0] = argument
        call(self.fd, _uapi.KVM_ENABLE_CAP, &request, "KVM_ENABLE_CAP")

    # -- memory -----------------------------------------------------------------------------------

    def set_memory(self, uint32_t slot, uint64_t gpa, uint64_t size, uint64_t hva, uint32_t flags=0):
        """Let ``size`` bytes at ``gpa`` be the host memory at ``hva``; ``size`` 0 empties the slot. §4.35."""
        cdef _uapi.kvm_userspace_memory_region region
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = size
        region.userspace_addr = hva
        try:
            call(self.fd, _uapi.KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION")
        except KvmError as error:
            raise _with_note(error, f"slot {slot}, {size:#x} bytes at {gpa:#x}") from None

    def dirty_log(self, uint32_t slot, bytearray bitmap not None):
        """Fill ``bitmap``, a bit per page of the slot, with the pages written since the last call. §4.8.

        ``len(bitmap)`` is a multiple of 8 and covers the slot: KVM writes whole 64-bit words.
        """
        cdef _uapi.kvm_dirty_log request
        memset(&request, 0, sizeof(request))
        request.slot = slot
        request.dirty_bitmap = <char *>bitmap
        call(self.fd, _uapi.KVM_GET_DIRTY_LOG, &request, "KVM_GET_DIRTY_LOG")

    def set_tss_address(self, uint64_t gpa):
        """Three pages KVM may use on Intel hosts. §4.12."""
        call_value(self.fd, _uapi.KVM_SET_TSS_ADDR, gpa, "KVM_SET_TSS_ADDR")

    def set_identity_map_address(self, uint64_t gpa):
        """One page KVM may use on Intel hosts. §4.42. Call it before the first vCPU is made."""
        call(self.fd, _uapi.KVM_SET_IDENTITY_MAP_ADDR, &gpa, "KVM_SET_IDENTITY_MAP_ADDR")

    # -- interrupts -------------------------------------------------------------------------------

    def create_irqchip(self):
        """PICs, IOAPIC and every vCPU's local APIC in the kernel. §4.24."""
        call_value(self.fd, _uapi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")

    def split_irqchip(self, uint32_t ioapic_pins):
        """Only the local APICs in the kernel; the first ``ioapic_pins`` GSIs are ours to route. §7.5."""
        self.enable_capability(_uapi.KVM_CAP_SPLIT_IRQCHIP, ioapic_pins)

    def enable_x2apic_ids(self):
        """APIC ids of 32 bits, for guests with more than 254 vCPUs. §7.7."""
        self.enable_capability(
            _uapi.KVM_CAP_X2APIC_API,
            _uapi.KVM_X2APIC_API_USE_32BIT_IDS | _uapi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
        )

    def create_pit(self):
        """An i8254, for hosts whose local APIC has no TSC deadline timer. §4.71."""
        cdef _uapi.kvm_pit_config config
        memset(&config, 0, sizeof(config))
        config.flags = _uapi.KVM_PIT_SPEAKER_DUMMY
        call(self.fd, _uapi.KVM_CREATE_PIT2, &config, "KVM_CREATE_PIT2")

    def set_irq_line(self, uint32_t gsi, bint level):
        """Drive a pin of the in-kernel controllers. §4.25."""
        cdef _uapi.kvm_irq_level request
        request.irq = gsi
        request.level = level
        call(self.fd, _uapi.KVM_IRQ_LINE, &request, "KVM_IRQ_LINE")

    def signal_msi(self, uint64_t address, uint32_t data):
        """Deliver one message-signalled interrupt; returns how many vCPUs took it. §4.70."""
        cdef _uapi.kvm_msi message
        memset(&message, 0, sizeof(message))
        message.address_lo = address & 0xFFFFFFFF
        message.address_hi = address >> 32
        message.data = data
        return call(self.fd, _uapi.KVM_SIGNAL_MSI, &message, "KVM_SIGNAL_MSI")

    def set_routing(self, pins, messages):
        """Replace the whole GSI table. §4.52.

        ``pins``: (gsi, chip, pin) of the in-kernel controllers; ``messages``: (gsi, address, data).
        """
        cdef size_t count = len(pins) + len(messages), index = 0
        cdef size_t size = sizeof(_uapi.kvm_irq_routing) + count * sizeof(_uapi.kvm_irq_routing_entry)
        cdef _uapi.kvm_irq_routing *table = <_uapi.kvm_irq_routing *>PyMem_Malloc(size)
        cdef _uapi.kvm_irq_routing_entry *entry
        if table == NULL:
            raise MemoryError
        try:
            memset(table, 0, size)
            table.nr = count
            for gsi, chip, pin in pins:
                entry = &table.entries[index]
                entry.gsi, entry.type = gsi, _uapi.KVM_IRQ_ROUTING_IRQCHIP
                entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
                index += 1
            for gsi, address, data in messages:
                entry = &table.entries[index]
                entry.gsi, entry.type = gsi, _uapi.KVM_IRQ_ROUTING_MSI
                entry.u.msi.address_lo, entry.u.msi.address_hi = address & 0xFFFFFFFF, address >> 32
                entry.u.msi.data = data
                index += 1
            call(self.fd, _uapi.KVM_SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING")
        finally:
            PyMem_Free(table)

    cdef _irqfd(self, int fd, uint32_t gsi, uint32_t flags, int resample_fd):
        cdef _uapi.kvm_irqfd request
        memset(&request, 0, sizeof(request))
        request.fd = fd
        request.gsi = gsi
        request.flags = flags
        request.resamplefd = <uint32_t>resample_fd
        try:
            call(self.fd, _uapi.KVM_IRQFD, &request, "KVM_IRQFD")
        except KvmError as error:
            raise _with_note(error, f"GSI {gsi}") from None

    def add_irqfd(self, int fd, uint32_t gsi, resample_fd=None):
        """A write to eventfd ``fd`` raises ``gsi``; with ``resample_fd``, level-triggered until EOI. §4.75."""
        if resample_fd is None:
            self._irqfd(fd, gsi, 0, 0)
        else:
            self._irqfd(fd, gsi, _uapi.KVM_IRQFD_FLAG_RESAMPLE, resample_fd)

    def remove_irqfd(self, int fd, uint32_t gsi):
        self._irqfd(fd, gsi, _uapi.KVM_IRQFD_FLAG_DEASSIGN, 0)

    # -- doorbells --------------------------------------------------------------------------------

    cdef _ioeventfd(self, int fd, uint64_t address, uint32_t size, object value, uint32_t flags):
        cdef _uapi.kvm_ioeventfd request
        memset(&request, 0, sizeof(request))
        if value is not None:
            request.datamatch = value
            flags |= _uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
        request.addr = address
        request.len = size
        request.fd = fd
        request.flags = flags
        try:
            call(self.fd, _uapi.KVM_IOEVENTFD, &request, "KVM_IOEVENTFD")
        except KvmError as error:
            raise _with_note(error, f"address {address:#x}") from None

    def add_ioeventfd(self, int fd, uint64_t address, uint32_t size, value=None, bint pio=False):
        """A guest write of ``size`` bytes (0: any) at ``address`` signals ``fd``, if it writes ``value``. §4.59."""
        self._ioeventfd(fd, address, size, value, _uapi.KVM_IOEVENTFD_FLAG_PIO if pio else 0)

    def remove_ioeventfd(self, int fd, uint64_t address, uint32_t size, value=None, bint pio=False):
        cdef uint32_t flags = _uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
        self._ioeventfd(fd, address, size, value, flags | (_uapi.KVM_IOEVENTFD_FLAG_PIO if pio else 0))

    # -- state ------------------------------------------------------------------------------------

    def irqchip_state(self, uint32_t chip):
        """One in-kernel controller (PIC_MASTER, PIC_SLAVE or IOAPIC) as KVM's own bytes. §4.26."""
        cdef bytearray state = bytearray(512 + 8)  # struct kvm_irqchip: chip_id, pad, 512 bytes
        cdef _uapi.kvm_irqchip *request = <_uapi.kvm_irqchip *><char *>state
        request.chip_id = chip
        call(self.fd, _uapi.KVM_GET_IRQCHIP, request, "KVM_GET_IRQCHIP")
        return bytes(state)

    def restore_irqchip(self, bytes state not None):
        if len(state) != 512 + 8:
            raise ValueError(f"an interrupt controller's state is 520 bytes, not {len(state)}")
        call(self.fd, _uapi.KVM_SET_IRQCHIP, <void *><char *>state, "KVM_SET_IRQCHIP")

    def pit_state(self):
        """The i8254 as KVM's own bytes. §4.72."""
        cdef bytearray state = bytearray(sizeof(_uapi.kvm_pit_state2))
        call(self.fd, _uapi.KVM_GET_PIT2, <void *><char *>state, "KVM_GET_PIT2")
        return bytes(state)

    def restore_pit(self, bytes state not None):
        if len(state) != sizeof(_uapi.kvm_pit_state2):
            raise ValueError(f"an i8254's state is {sizeof(_uapi.kvm_pit_state2)} bytes, not {len(state)}")
        call(self.fd, _uapi.KVM_SET_PIT2, <void *><char *>state, "KVM_SET_PIT2")

    @property
    def clock(self):
        """The guest's kvmclock, in nanoseconds since it was created. §4.29."""
        cdef _uapi.kvm_clock_data data
        call(self.fd, _uapi.KVM_GET_CLOCK, &data, "KVM_GET_CLOCK")
        return data.clock

    @clock.setter
    def clock(self, uint64_t nanoseconds):
        cdef _uapi.kvm_clock_data data
        memset(&data, 0, sizeof(data))
        data.clock = nanoseconds
        call(self.fd, _uapi.KVM_SET_CLOCK, &data, "KVM_SET_CLOCK")

    # -- vCPUs ------------------------------------------------------------------------------------

    def create_vcpu(self, uint32_t apic_id):
        """A vCPU whose local APIC has ``apic_id``. §4.7."""
        try:
            fd = call_value(self.fd, _uapi.KVM_CREATE_VCPU, apic_id, "KVM_CREATE_VCPU")
        except KvmError as error:
            raise _with_note(error, f"vCPU with APIC id {apic_id}") from None
        return Vcpu(fd, apic_id, self.vcpu_mmap_size, max(4096, self.extension(_uapi.KVM_CAP_XSAVE2)),
                    self.extension(_uapi.KVM_CAP_NESTED_STATE))

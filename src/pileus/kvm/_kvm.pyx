"""/dev/kvm itself: what this host's KVM can do, and new VMs."""

import os

from cpython.mem cimport PyMem_Free, PyMem_Malloc

from pileus.kvm cimport _uapi
from pileus.kvm._ioctl cimport call, call_value
from pileus.errors import HostError, KvmError
from pileus.kvm._vm import Vm

# What pileus cannot do without, by the name a user can look up in the kernel's documentation.
REQUIRED = {
    "KVM_CAP_IRQCHIP": _uapi.KVM_CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": _uapi.KVM_CAP_USER_MEMORY,
    "KVM_CAP_SET_TSS_ADDR": _uapi.KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_EXT_CPUID": _uapi.KVM_CAP_EXT_CPUID,
    "KVM_CAP_MP_STATE": _uapi.KVM_CAP_MP_STATE,
    "KVM_CAP_IRQ_ROUTING": _uapi.KVM_CAP_IRQ_ROUTING,
    "KVM_CAP_IRQFD": _uapi.KVM_CAP_IRQFD,
    "KVM_CAP_IOEVENTFD": _uapi.KVM_CAP_IOEVENTFD,
    "KVM_CAP_SIGNAL_MSI": _uapi.KVM_CAP_SIGNAL_MSI,
    "KVM_CAP_VCPU_EVENTS": _uapi.KVM_CAP_VCPU_EVENTS,
    "KVM_CAP_XSAVE": _uapi.KVM_CAP_XSAVE,
    "KVM_CAP_XCRS": _uapi.KVM_CAP_XCRS,
    "KVM_CAP_IMMEDIATE_EXIT": _uapi.KVM_CAP_IMMEDIATE_EXIT,
}
CPUID_ENTRIES = 256


cdef class Kvm:
    """The system fd of KVM. A context manager; VMs made from it outlive it.

    Raises HostError where ``path`` cannot be opened, and where KVM lacks a capability of REQUIRED, naming it.
    """

    cdef readonly int fd

    def __cinit__(self):
        self.fd = -1

    def __init__(self, path="/dev/kvm"):
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError("open", path, error) from error
        version = call_value(self.fd, _uapi.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
        if version != _uapi.KVM_API_VERSION:
            raise HostError("use", path, f"its API version is {version}, not {_uapi.KVM_API_VERSION}")
        for name, number in REQUIRED.items():
            if not self.extension(number):
                raise HostError("use", path, f"this kernel's KVM has no {name}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def extension(self, int capability):
        """The value of a KVM_CAP_*: 0 where it is absent. KVM API §4.4."""
        return call_value(self.fd, _uapi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    @property
    def max_vcpus(self):
        """How many vCPUs one VM may have."""
        return self.extension(_uapi.KVM_CAP_MAX_VCPUS) or self.extension(_uapi.KVM_CAP_NR_VCPUS)

    @property
    def max_vcpu_id(self):
        """The largest vCPU (and APIC) id, plus one."""
        return self.extension(_uapi.KVM_CAP_MAX_VCPU_ID) or self.max_vcpus

    @property
    def has_tsc_deadline(self):
        return bool(self.extension(_uapi.KVM_CAP_TSC_DEADLINE_TIMER))

    @property
    def has_split_irqchip(self):
        return bool(self.extension(_uapi.KVM_CAP_SPLIT_IRQCHIP))

    @property
    def vcpu_mmap_size(self):
        return call_value(self.fd, _uapi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self):
        """What KVM can give a guest: a list of (function, index, flags, eax, ebx, ecx, edx). KVM API §4.46."""
        cdef size_t size = sizeof(_uapi.kvm_cpuid2) + CPUID_ENTRIES * sizeof(_uapi.kvm_cpuid_entry2)
        cdef _uapi.kvm_cpuid2 *table = <_uapi.kvm_cpuid2 *>PyMem_Malloc(size)
        cdef _uapi.kvm_cpuid_entry2 *entry
        if table == NULL:
            raise MemoryError
        try:
            table.nent = CPUID_ENTRIES
            call(self.fd, _uapi.KVM_GET_SUPPORTED_CPUID, table, "KVM_GET_SUPPORTED_CPUID")
            entries = []
            for position in range(table.nent):
                entry = &table.entries[position]
                entries.append(
                    (entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx)
                )
            return entries
        finally:
            PyMem_Free(table)

    def msr_indices(self):
        """The MSRs that hold guest state. KVM API §4.3."""
        cdef _uapi.kvm_msr_list probe
        cdef _uapi.kvm_msr_list *table
        probe.nmsrs = 0
        try:
            call(self.fd, _uapi.KVM_GET_MSR_INDEX_LIST, &probe, "KVM_GET_MSR_INDEX_LIST")
        except KvmError:
            pass  # E2BIG, with the right count filled in
        table = <_uapi.kvm_msr_list *>PyMem_Malloc(sizeof(probe) + probe.nmsrs * sizeof(table.indices[0]))
        if table == NULL:
            raise MemoryError
        try:
            table.nmsrs = probe.nmsrs
            call(self.fd, _uapi.KVM_GET_MSR_INDEX_LIST, table, "KVM_GET_MSR_INDEX_LIST")
            return [table.indices[position] for position in range(table.nmsrs)]
        finally:
            PyMem_Free(table)

    def create_vm(self):
        """A new, empty VM. KVM API §4.2."""
        return Vm(call_value(self.fd, _uapi.KVM_CREATE_VM, 0, "KVM_CREATE_VM"), self.vcpu_mmap_size)

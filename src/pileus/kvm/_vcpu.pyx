"""A vCPU: its registers, and the loop around KVM_RUN that serves its exits without the GIL."""

import os

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pileus.bus._bus cimport Bus
from pileus.kvm cimport _uapi
from pileus.kvm._ioctl cimport call, call_value
from pileus.errors import HostError, KvmError


cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_kill(pthread_t thread, int number)


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    struct sigaction:
        void (*sa_handler)(int)
        sigset_t sa_mask
        int sa_flags
    int c_sigaction "sigaction"(int number, const sigaction *action, sigaction *old)
    int SIGRTMIN


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void *MAP_FAILED


cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long argument)
    int PR_SET_NAME


# What ``run`` comes back for; the second item of its result says more.
KICKED = "kicked"                  # kick() was called; None
TRIPLE_FAULT = "triple fault"      # the guest shut down without meaning to; None
SYSTEM_EVENT = "system event"      # (type, first datum): one of the three below
HALTED = "halted"                  # HLT without a local APIC in the kernel; None
IOAPIC_EOI = "ioapic eoi"          # the vector; with a split irqchip only
DEVICE_FAILED = "device failed"    # a Python device raised: the exception
INTERNAL_ERROR = "internal error"  # (suberror, data…): KVM could not go on
FAILED_ENTRY = "failed entry"      # the hardware's reason
UNKNOWN_EXIT = "unknown exit"      # the exit reason

EVENT_SHUTDOWN = _uapi.KVM_SYSTEM_EVENT_SHUTDOWN
EVENT_RESET = _uapi.KVM_SYSTEM_EVENT_RESET
EVENT_CRASH = _uapi.KVM_SYSTEM_EVENT_CRASH

cdef enum:
    REASONS = 64         # more than there are KVM_EXIT_* today; others share the last count
    LOOP_AGAIN = -1
    LOOP_KICKED = -2
    LOOP_DEVICE = -3

# Blobs of state that only KVM reads, by name: (get ioctl, its name, set ioctl, its name, bytes). The numbers
# come through a C enum and may be negative here.
cdef dict PARTS = {
    "fpu": (_uapi.KVM_GET_FPU, "KVM_GET_FPU", _uapi.KVM_SET_FPU, "KVM_SET_FPU", sizeof(_uapi.kvm_fpu)),
    "lapic": (
        _uapi.KVM_GET_LAPIC, "KVM_GET_LAPIC", _uapi.KVM_SET_LAPIC, "KVM_SET_LAPIC",
        sizeof(_uapi.kvm_lapic_state),
    ),
    "mp_state": (
        _uapi.KVM_GET_MP_STATE, "KVM_GET_MP_STATE", _uapi.KVM_SET_MP_STATE, "KVM_SET_MP_STATE",
        sizeof(_uapi.kvm_mp_state),
    ),
    "events": (
        _uapi.KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS", _uapi.KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS",
        sizeof(_uapi.kvm_vcpu_events),
    ),
    "debugregs": (
        _uapi.KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS", _uapi.KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS",
        sizeof(_uapi.kvm_debugregs),
    ),
    "xcrs": (
        _uapi.KVM_GET_XCRS, "KVM_GET_XCRS", _uapi.KVM_SET_XCRS, "KVM_SET_XCRS", sizeof(_uapi.kvm_xcrs),
    ),
}
# The order in which a state is put back: what later parts depend on comes first.
RESTORE_ORDER = ("mp_state", "regs", "sregs", "xsave", "xcrs", "debugregs", "lapic", "msrs", "events", "nested")


cdef void _ignore(int number) noexcept nogil:
    """The kick signal has no work to do: that it interrupts KVM_RUN is all."""


cdef bint _kick_signal_ready = False


cdef _install_kick_signal():
    global _kick_signal_ready
    cdef sigaction action
    if _kick_signal_ready:
        return
    memset(&action, 0, sizeof(action))
    action.sa_handler = _ignore
    if c_sigaction(SIGRTMIN, &action, NULL) < 0:
        raise OSError(errno, "sigaction")
    _kick_signal_ready = True


cdef uint64_t _now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + now.tv_nsec


def name_thread(name):
    """Name the calling thread; 15 bytes at most are kept."""
    cdef bytes text = name.encode()
    prctl(PR_SET_NAME, <unsigned long><char *>text)


cdef class Vcpu:
    """One vCPU. ``run`` belongs to the vCPU's own thread; ``kick`` and ``exits`` to any; the rest to whoever
    knows that it is not running.
    """

    cdef readonly int fd
    cdef readonly uint32_t apic_id
    cdef readonly uint64_t entered_ns  # CLOCK_MONOTONIC just before the first KVM_RUN; 0 until then
    cdef _uapi.kvm_run *page
    cdef size_t page_size
    cdef size_t xsave_size
    cdef size_t nested_size
    cdef pthread_t thread
    cdef bint bound
    cdef uint64_t counts[REASONS]

    def __cinit__(self, int fd, uint32_t apic_id, size_t page_size, size_t xsave_size, size_t nested_size):
        cdef void *page
        self.fd, self.apic_id = fd, apic_id
        self.page_size, self.xsave_size, self.nested_size = page_size, xsave_size, nested_size
        _install_kick_signal()
        page = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if page == MAP_FAILED:
            raise HostError("map", f"vCPU {apic_id}", OSError(errno, "mmap"))
        self.page = <_uapi.kvm_run *>page

    def __dealloc__(self):
        if self.page != NULL:
            munmap(self.page, self.page_size)

    def close(self):
        """Close the fd; KVM_RUN must have returned for good."""
        if self.page != NULL:
            munmap(self.page, self.page_size)
            self.page = NULL
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- running ----------------------------------------------------------------------------------

    def run(self, Bus ports not None, Bus mmio not None):
        """Run the guest until something happens that is not an access to a bus: (reason, detail).

        Raises KvmError where KVM_RUN fails. Source: KVM API §4.10 and §5.
        """
        cdef int result
        self.thread, self.bound = pthread_self(), True
        if self.entered_ns == 0:
            self.entered_ns = _now_ns()
        try:
            with nogil:
                result = self._loop(ports, mmio)
        finally:
            self.bound = False
        if result == LOOP_KICKED:
            return KICKED, None
        if result == LOOP_DEVICE:
            return DEVICE_FAILED, ports.take_error() or mmio.take_error()
        if result != 0:
            raise KvmError("KVM_RUN", result, f"vCPU {self.apic_id}, RIP {self.rip_text()}")
        return self._explain()

    cdef int _loop(self, Bus ports, Bus mmio) noexcept nogil:
        """0: the exit in ``page`` is for the caller; positive: the errno of KVM_RUN; or a LOOP_ value."""
        cdef int error, outcome = LOOP_AGAIN
        cdef uint32_t reason
        while outcome == LOOP_AGAIN:
            if _uapi.ioctl(self.fd, _uapi.KVM_RUN, 0) < 0:
                error = errno
                if error == EINTR:
                    self.counts[_uapi.KVM_EXIT_INTR] += 1
                    if self.page.immediate_exit:
                        self.page.immediate_exit = 0
                        return LOOP_KICKED
                elif error != EAGAIN:
                    return error
                continue
            reason = self.page.exit_reason
            self.counts[min(reason, <uint32_t>REASONS - 1)] += 1
            if reason == _uapi.KVM_EXIT_IO:
                outcome = self._serve_port(ports)
            elif reason == _uapi.KVM_EXIT_MMIO:
                outcome = self._serve_mmio(mmio)
            elif reason != _uapi.KVM_EXIT_INTR:
                return 0
        return outcome

    cdef int _serve_port(self, Bus ports) noexcept nogil:
        cdef uint8_t *data = <uint8_t *>self.page + self.page.io.data_offset
        cdef uint32_t size = self.page.io.size, count = self.page.io.count
        cdef int result = 0
        while count and result == 0:
            if self.page.io.direction == _uapi.KVM_EXIT_IO_IN:
                result = ports.read(self.page.io.port, data, size)
            else:
                result = ports.write(self.page.io.port, data, size)
            data += size
            count -= 1
        return LOOP_AGAIN if result == 0 else LOOP_DEVICE

    cdef int _serve_mmio(self, Bus mmio) noexcept nogil:
        cdef int result
        if self.page.mmio.is_write:
            result = mmio.write(self.page.mmio.phys_addr, self.page.mmio.data, self.page.mmio.len)
        else:
            result = mmio.read(self.page.mmio.phys_addr, self.page.mmio.data, self.page.mmio.len)
        return LOOP_AGAIN if result == 0 else LOOP_DEVICE

    cdef _explain(self):
        cdef uint32_t reason = self.page.exit_reason
        if reason == _uapi.KVM_EXIT_SHUTDOWN:
            return TRIPLE_FAULT, None
        if reason == _uapi.KVM_EXIT_SYSTEM_EVENT:
            return SYSTEM_EVENT, (self.page.system_event.type, self.page.system_event.data[0])
        if reason == _uapi.KVM_EXIT_HLT:
            return HALTED, None
        if reason == _uapi.KVM_EXIT_IOAPIC_EOI:
            return IOAPIC_EOI, self.page.eoi.vector
        if reason == _uapi.KVM_EXIT_INTERNAL_ERROR:
            count = min(self.page.internal.ndata, 16)
            return INTERNAL_ERROR, (
                self.page.internal.suberror, *[self.page.internal.data[index] for index in range(count)]
            )
        if reason == _uapi.KVM_EXIT_FAIL_ENTRY:
            return FAILED_ENTRY, self.page.fail_entry.hardware_entry_failure_reason
        return UNKNOWN_EXIT, reason

    def kick(self):
        """Make ``run`` return KICKED soon: at once if the guest runs, else before it would run again.

        immediate_exit closes the gap between a look at a flag and KVM_RUN: a signal alone can fall into it.
        """
        if self.page == NULL:
            return  # closed
        self.page.immediate_exit = 1
        if self.bound:
            pthread_kill(self.thread, SIGRTMIN)

    @property
    def exits(self):
        """How often KVM_RUN came back, by KVM_EXIT_* number."""
        return {reason: self.counts[reason] for reason in range(REASONS) if self.counts[reason]}

    def rip_text(self):
        """RIP in hexadecimal, or "unknown": for error messages."""
        try:
            return f"{self.regs['rip']:#x}"
        except KvmError:
            return "unknown"

    # -- what the machine sets up ------------------------------------------------------------------

    def set_cpuid(self, entries):
        """``entries`` as Kvm.supported_cpuid gives them. KVM API §4.46."""
        cdef size_t count = len(entries), index = 0
        cdef _uapi.kvm_cpuid2 *table
        cdef _uapi.kvm_cpuid_entry2 *entry
        table = <_uapi.kvm_cpuid2 *>PyMem_Malloc(sizeof(_uapi.kvm_cpuid2) + count * sizeof(_uapi.kvm_cpuid_entry2))
        if table == NULL:
            raise MemoryError
        try:
            memset(table, 0, sizeof(_uapi.kvm_cpuid2) + count * sizeof(_uapi.kvm_cpuid_entry2))
            table.nent = count
            for function, subleaf, flags, eax, ebx, ecx, edx in entries:
                entry = &table.entries[index]
                entry.function, entry.index, entry.flags = function, subleaf, flags
                entry.eax, entry.ebx, entry.ecx, entry.edx = eax, ebx, ecx, edx
                index += 1
            call(self.fd, _uapi.KVM_SET_CPUID2, table, "KVM_SET_CPUID2")
        finally:
            PyMem_Free(table)

    @property
    def regs(self):
        """The general registers by name, RIP and RFLAGS among them. §4.11."""
        cdef _uapi.kvm_regs regs
        call(self.fd, _uapi.KVM_GET_REGS, &regs, "KVM_GET_REGS")
        return regs

    @regs.setter
    def regs(self, values):
        """Registers that ``values`` does not name become 0."""
        cdef _uapi.kvm_regs regs = dict.fromkeys(REGISTERS, 0) | values
        call(self.fd, _uapi.KVM_SET_REGS, &regs, "KVM_SET_REGS")

    @property
    def sregs(self):
        """Segments, descriptor tables and control registers: a dict like struct kvm_sregs. §4.13."""
        cdef _uapi.kvm_sregs sregs
        call(self.fd, _uapi.KVM_GET_SREGS, &sregs, "KVM_GET_SREGS")
        return sregs

    @sregs.setter
    def sregs(self, values):
        cdef _uapi.kvm_sregs sregs = values
        call(self.fd, _uapi.KVM_SET_SREGS, &sregs, "KVM_SET_SREGS")

    def get_msrs(self, indices):
        """{index: value} of those MSRs of ``indices`` that this vCPU has. §4.18."""
        cdef size_t position = 0
        cdef int done
        cdef list wanted = list(indices)
        cdef size_t size = sizeof(_uapi.kvm_msrs) + len(wanted) * sizeof(_uapi.kvm_msr_entry)
        cdef _uapi.kvm_msrs *table = <_uapi.kvm_msrs *>PyMem_Malloc(size)
        if table == NULL:
            raise MemoryError
        found = {}
        try:
            while wanted:
                memset(table, 0, size)
                table.nmsrs = len(wanted)
                for position, index in enumerate(wanted):
                    table.entries[position].index = index
                done = call(self.fd, _uapi.KVM_GET_MSRS, table, "KVM_GET_MSRS")
                for position in range(<size_t>done):
                    found[table.entries[position].index] = table.entries[position].data
                del wanted[: done + 1]  # the one KVM stopped at is one this vCPU does not have
            return found
        finally:
            PyMem_Free(table)

    def set_msrs(self, values):
        """Set each MSR of the dict ``values``. Raises KvmError naming the one that KVM refuses. §4.19."""
        cdef size_t position
        cdef int done
        cdef size_t size = sizeof(_uapi.kvm_msrs) + len(values) * sizeof(_uapi.kvm_msr_entry)
        cdef _uapi.kvm_msrs *table = <_uapi.kvm_msrs *>PyMem_Malloc(size)
        if table == NULL:
            raise MemoryError
        try:
            memset(table, 0, size)
            table.nmsrs = len(values)
            for position, (index, value) in enumerate(values.items()):
                table.entries[position].index = index
                table.entries[position].data = value
            done = call(self.fd, _uapi.KVM_SET_MSRS, table, "KVM_SET_MSRS")
            if <size_t>done < table.nmsrs:
                raise KvmError("KVM_SET_MSRS", 22, f"MSR {table.entries[done].index:#x}")
        finally:
            PyMem_Free(table)

    # -- state as KVM's own bytes ------------------------------------------------------------------

    def get_part(self, str name not None):
        """One blob of state, by its name in PARTS."""
        request, label, _, _, size = PARTS[name]
        cdef bytearray blob = bytearray(size)
        call(self.fd, request & 0xFFFFFFFF, <void *><char *>blob, label)
        return bytes(blob)

    def set_part(self, str name not None, bytes blob not None):
        _, _, request, label, size = PARTS[name]
        if len(blob) != size:
            raise ValueError(f"{name} is {size} bytes, not {len(blob)}")
        call(self.fd, request & 0xFFFFFFFF, <void *><char *>blob, label)

    cdef _get_xsave(self):
        cdef bytearray blob = bytearray(self.xsave_size)
        if self.xsave_size > 4096:
            call(self.fd, _uapi.KVM_GET_XSAVE2, <void *><char *>blob, "KVM_GET_XSAVE2")
        else:
            call(self.fd, _uapi.KVM_GET_XSAVE, <void *><char *>blob, "KVM_GET_XSAVE")
        return bytes(blob)

    cdef _set_xsave(self, bytes blob):
        if len(blob) < self.xsave_size:
            raise ValueError(f"xsave is {self.xsave_size} bytes, not {len(blob)}")
        call(self.fd, _uapi.KVM_SET_XSAVE, <void *><char *>blob, "KVM_SET_XSAVE")

    cdef _get_nested(self):
        cdef bytearray blob = bytearray(self.nested_size)
        cdef _uapi.kvm_nested_state *nested = <_uapi.kvm_nested_state *><char *>blob
        nested.size = self.nested_size
        call(self.fd, _uapi.KVM_GET_NESTED_STATE, nested, "KVM_GET_NESTED_STATE")
        return bytes(blob[: nested.size])

    cdef _set_nested(self, bytes blob):
        cdef const _uapi.kvm_nested_state *nested = <const _uapi.kvm_nested_state *><char *>blob
        if len(blob) < sizeof(_uapi.kvm_nested_state) or nested.size != len(blob):
            raise ValueError(f"nested state of {len(blob)} bytes does not hold what it says")
        call(self.fd, _uapi.KVM_SET_NESTED_STATE, <void *>nested, "KVM_SET_NESTED_STATE")

    def state(self, msr_indices):
        """All that a snapshot needs of this vCPU, as a dict of plain values; CPUID is the machine's to keep."""
        parts = {name: self.get_part(name) for name in ("mp_state", "debugregs", "xcrs", "lapic", "events")}
        parts |= {"regs": self.regs, "sregs": self.sregs, "xsave": self._get_xsave()}
        parts |= {"msrs": self.get_msrs(msr_indices), "tsc_khz": self.tsc_khz}
        if self.nested_size:
            parts["nested"] = self._get_nested()
        return parts

    def restore(self, parts):
        """Put a ``state`` back, after ``set_cpuid``. Raises KvmError naming an MSR that KVM refuses."""
        for name in RESTORE_ORDER:
            if name not in parts:
                continue
            value = parts[name]
            if name == "regs":
                self.regs = value
            elif name == "sregs":
                self.sregs = value
            elif name == "xsave":
                self._set_xsave(value)
            elif name == "msrs":
                self.set_msrs(value)
            elif name == "nested":
                self._set_nested(value)
            else:
                self.set_part(name, value)

    @property
    def tsc_khz(self):
        """The guest's TSC frequency in kHz. §4.56."""
        return call_value(self.fd, _uapi.KVM_GET_TSC_KHZ, 0, "KVM_GET_TSC_KHZ")

    @tsc_khz.setter
    def tsc_khz(self, unsigned long khz):
        call_value(self.fd, _uapi.KVM_SET_TSC_KHZ, khz, "KVM_SET_TSC_KHZ")

    def note_pause(self):
        """Tell the guest's watchdogs that it was stopped by the host. §4.78. EINVAL: no kvmclock yet."""
        call_value(self.fd, _uapi.KVM_KVMCLOCK_CTRL, 0, "KVM_KVMCLOCK_CTRL")

    def inject_nmi(self):
        """§4.64."""
        call_value(self.fd, _uapi.KVM_NMI, 0, "KVM_NMI")


REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)

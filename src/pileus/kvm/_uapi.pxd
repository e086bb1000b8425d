"""The kernel's own declarations: nothing here is a number of ours. Source: <linux/kvm.h>, <asm/kvm.h>."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<linux/kvm.h>" nogil:
    # system
    enum:
        KVM_API_VERSION
        KVM_GET_API_VERSION
        KVM_CREATE_VM
        KVM_CHECK_EXTENSION
        KVM_GET_VCPU_MMAP_SIZE
        KVM_GET_SUPPORTED_CPUID
        KVM_GET_MSR_INDEX_LIST

    # VM
    enum:
        KVM_ENABLE_CAP
        KVM_SET_TSS_ADDR
        KVM_SET_IDENTITY_MAP_ADDR
        KVM_SET_USER_MEMORY_REGION
        KVM_MEM_LOG_DIRTY_PAGES
        KVM_MEM_READONLY
        KVM_GET_DIRTY_LOG
        KVM_CREATE_IRQCHIP
        KVM_CREATE_PIT2
        KVM_PIT_SPEAKER_DUMMY
        KVM_IRQ_LINE
        KVM_GET_IRQCHIP
        KVM_SET_IRQCHIP
        KVM_IRQCHIP_PIC_MASTER
        KVM_IRQCHIP_PIC_SLAVE
        KVM_IRQCHIP_IOAPIC
        KVM_GET_PIT2
        KVM_SET_PIT2
        KVM_SET_GSI_ROUTING
        KVM_IRQ_ROUTING_IRQCHIP
        KVM_IRQ_ROUTING_MSI
        KVM_MSI_VALID_DEVID
        KVM_SIGNAL_MSI
        KVM_IRQFD
        KVM_IRQFD_FLAG_DEASSIGN
        KVM_IRQFD_FLAG_RESAMPLE
        KVM_IOEVENTFD
        KVM_IOEVENTFD_FLAG_DATAMATCH
        KVM_IOEVENTFD_FLAG_PIO
        KVM_IOEVENTFD_FLAG_DEASSIGN
        KVM_GET_CLOCK
        KVM_SET_CLOCK
        KVM_CREATE_VCPU
        KVM_SET_BOOT_CPU_ID

    # vCPU
    enum:
        KVM_RUN
        KVM_SET_CPUID2
        KVM_GET_CPUID2
        KVM_GET_MSRS
        KVM_SET_MSRS
        KVM_GET_REGS
        KVM_SET_REGS
        KVM_GET_SREGS
        KVM_SET_SREGS
        KVM_GET_FPU
        KVM_SET_FPU
        KVM_GET_LAPIC
        KVM_SET_LAPIC
        KVM_GET_MP_STATE
        KVM_SET_MP_STATE
        KVM_GET_VCPU_EVENTS
        KVM_SET_VCPU_EVENTS
        KVM_GET_DEBUGREGS
        KVM_SET_DEBUGREGS
        KVM_GET_XSAVE
        KVM_GET_XSAVE2
        KVM_SET_XSAVE
        KVM_GET_XCRS
        KVM_SET_XCRS
        KVM_GET_NESTED_STATE
        KVM_SET_NESTED_STATE
        KVM_GET_TSC_KHZ
        KVM_SET_TSC_KHZ
        KVM_KVMCLOCK_CTRL
        KVM_NMI

    # exits
    enum:
        KVM_EXIT_IO
        KVM_EXIT_IO_IN
        KVM_EXIT_MMIO
        KVM_EXIT_HLT
        KVM_EXIT_SHUTDOWN
        KVM_EXIT_FAIL_ENTRY
        KVM_EXIT_INTR
        KVM_EXIT_INTERNAL_ERROR
        KVM_EXIT_SYSTEM_EVENT
        KVM_EXIT_IOAPIC_EOI
        KVM_SYSTEM_EVENT_SHUTDOWN
        KVM_SYSTEM_EVENT_RESET
        KVM_SYSTEM_EVENT_CRASH

    # capabilities
    enum:
        KVM_CAP_IRQCHIP
        KVM_CAP_USER_MEMORY
        KVM_CAP_SET_TSS_ADDR
        KVM_CAP_SET_IDENTITY_MAP_ADDR
        KVM_CAP_EXT_CPUID
        KVM_CAP_NR_VCPUS
        KVM_CAP_NR_MEMSLOTS
        KVM_CAP_MP_STATE
        KVM_CAP_IRQ_ROUTING
        KVM_CAP_IRQFD
        KVM_CAP_PIT2
        KVM_CAP_IOEVENTFD
        KVM_CAP_ADJUST_CLOCK
        KVM_CAP_VCPU_EVENTS
        KVM_CAP_DEBUGREGS
        KVM_CAP_XSAVE
        KVM_CAP_XCRS
        KVM_CAP_GET_TSC_KHZ
        KVM_CAP_MAX_VCPUS
        KVM_CAP_TSC_DEADLINE_TIMER
        KVM_CAP_KVMCLOCK_CTRL
        KVM_CAP_SIGNAL_MSI
        KVM_CAP_READONLY_MEM
        KVM_CAP_IRQFD_RESAMPLE
        KVM_CAP_SPLIT_IRQCHIP
        KVM_CAP_MAX_VCPU_ID
        KVM_CAP_X2APIC_API
        KVM_X2APIC_API_USE_32BIT_IDS
        KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
        KVM_CAP_IMMEDIATE_EXIT
        KVM_CAP_NESTED_STATE
        KVM_CAP_XSAVE2

    struct kvm_enable_cap:
        uint32_t cap
        uint32_t flags
        uint64_t args[4]

    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr

    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap

    struct kvm_pit_config:
        uint32_t flags

    struct kvm_pit_state2:
        pass

    struct kvm_irq_level:
        uint32_t irq
        uint32_t level

    struct kvm_irqchip:
        uint32_t chip_id

    struct kvm_irq_routing_irqchip:
        uint32_t irqchip
        uint32_t pin

    struct kvm_irq_routing_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
        uint32_t devid

    union kvm_irq_routing_u:
        kvm_irq_routing_irqchip irqchip
        kvm_irq_routing_msi msi

    struct kvm_irq_routing_entry:
        uint32_t gsi
        uint32_t type
        uint32_t flags
        kvm_irq_routing_u u

    struct kvm_irq_routing:
        uint32_t nr
        uint32_t flags
        kvm_irq_routing_entry entries[0]

    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
        uint32_t flags
        uint32_t devid

    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
        uint32_t resamplefd

    struct kvm_ioeventfd:
        uint64_t datamatch
        uint64_t addr
        uint32_t len
        int32_t fd
        uint32_t flags

    struct kvm_clock_data:
        uint64_t clock
        uint32_t flags

    struct kvm_cpuid_entry2:
        uint32_t function
        uint32_t index
        uint32_t flags
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 entries[0]

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t indices[0]

    struct kvm_msr_entry:
        uint32_t index
        uint32_t reserved
        uint64_t data

    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[0]

    struct kvm_regs:
        uint64_t rax
        uint64_t rbx
        uint64_t rcx
        uint64_t rdx
        uint64_t rsi
        uint64_t rdi
        uint64_t rsp
        uint64_t rbp
        uint64_t r8
        uint64_t r9
        uint64_t r10
        uint64_t r11
        uint64_t r12
        uint64_t r13
        uint64_t r14
        uint64_t r15
        uint64_t rip
        uint64_t rflags

    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type
        uint8_t present
        uint8_t dpl
        uint8_t db
        uint8_t s
        uint8_t l
        uint8_t g
        uint8_t avl
        uint8_t unusable

    struct kvm_dtable:
        uint64_t base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs
        kvm_segment ds
        kvm_segment es
        kvm_segment fs
        kvm_segment gs
        kvm_segment ss
        kvm_segment tr
        kvm_segment ldt
        kvm_dtable gdt
        kvm_dtable idt
        uint64_t cr0
        uint64_t cr2
        uint64_t cr3
        uint64_t cr4
        uint64_t cr8
        uint64_t efer
        uint64_t apic_base
        uint64_t interrupt_bitmap[4]

    struct kvm_fpu:
        pass

    struct kvm_lapic_state:
        char regs[1024]

    struct kvm_mp_state:
        uint32_t mp_state

    struct kvm_vcpu_events:
        pass

    struct kvm_debugregs:
        pass

    struct kvm_xsave:
        pass

    struct kvm_xcrs:
        pass

    struct kvm_nested_state:
        uint16_t flags
        uint16_t format
        uint32_t size

    struct kvm_exit_io:
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    struct kvm_exit_mmio:
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct kvm_exit_fail_entry:
        uint64_t hardware_entry_failure_reason
        uint32_t cpu

    struct kvm_exit_internal:
        uint32_t suberror
        uint32_t ndata
        uint64_t data[16]

    struct kvm_exit_system_event:
        uint32_t type
        uint32_t ndata
        uint64_t data[16]

    struct kvm_exit_eoi:
        uint8_t vector

    struct kvm_run:
        uint8_t immediate_exit
        uint32_t exit_reason
        kvm_exit_io io
        kvm_exit_mmio mmio
        kvm_exit_fail_entry fail_entry
        kvm_exit_internal internal
        kvm_exit_system_event system_event
        kvm_exit_eoi eoi

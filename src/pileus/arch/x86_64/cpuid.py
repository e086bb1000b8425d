"""CPUID: what KVM supports, made into one vCPU's own answer.

Source: Intel SDM Vol. 2A, CPUID; AMD APM Vol. 3, Appendix E; Documentation/virt/kvm/x86/cpuid.rst.
"""

from pileus.arch.x86_64.topology import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.kvm._kvm import CpuidEntry

    Leaf = list[int]  # function, index, flags, eax, ebx, ecx, edx

EAX, EBX, ECX, EDX = 3, 4, 5, 6
SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf has subleaves
INTEL, AMD, OTHER = "intel", "amd", "other"

HYPERVISOR = 1 << 31  # leaf 1, ECX
TSC_DEADLINE = 1 << 24  # leaf 1, ECX
HTT = 1 << 28  # leaf 1, EDX: more than one logical CPU in a package
CMP_LEGACY = 1 << 1  # leaf 0x80000001, ECX: the same, said by AMD

KVM_SIGNATURE_LEAF = 0x40000000
KVM_FEATURES_LEAF = 0x40000001
MSI_EXT_DEST_ID = 1 << 15  # EAX: bits 11 to 5 of an MSI address extend the destination's APIC id to 15 bits
KVM_TIMING_LEAF = 0x40000010  # TSC and APIC timer frequency in kHz: the leaf that hypervisors agreed on
APIC_TIMER_KHZ = 1_000_000  # KVM's local APIC counts nanoseconds
LEVEL_SMT, LEVEL_CORE, LEVEL_DIE = 1, 2, 5
TOPOLOGY_LEAVES = (0xB, 0x1F, 0x80000026)  # made here, never the host's own


def vendor_of(supported: "list[CpuidEntry]") -> str:
    for function, _, _, _, ebx, ecx, edx in supported:
        if function == 0:
            name = b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx))
            return {b"GenuineIntel": INTEL, b"AuthenticAMD": AMD, b"HygonGenuine": AMD}.get(name, OTHER)
    return OTHER


class Template:
    """The guest's CPUID but for what differs from one vCPU to the next.

    ``max_phys_bits`` caps the physical address width; ``tsc_khz`` is the guest's TSC frequency in kHz.
    ``long_apic_ids`` says that interrupts reach APIC ids above 254.
    """

    def __init__(
        self,
        supported: "list[CpuidEntry]",
        topology: Topology,
        *,
        tsc_khz: int,
        tsc_deadline: bool,
        max_phys_bits: int | None = None,
        long_apic_ids: bool = False,
    ) -> None:
        self.topology = topology
        self.vendor = vendor_of(supported)
        self.leaves: list[Leaf] = [list(entry) for entry in supported if entry[0] not in TOPOLOGY_LEAVES]
        self.tsc_khz = tsc_khz
        self._set_features(tsc_deadline, long_apic_ids)
        self._set_address_width(max_phys_bits)
        self._add_timing()
        if self._tells_dies and (base := self._find(0)):
            base[EAX] = max(base[EAX], 0x1F)

    @property
    def phys_bits(self) -> int:
        """The guest's physical address width in bits."""
        leaf = self._find(0x80000008)
        return leaf[EAX] & 0xFF if leaf else 36

    def for_vcpu(self, index: int) -> "list[CpuidEntry]":
        """The CPUID of vCPU ``index``, for Vcpu.set_cpuid."""
        apic_id = self.topology.apic_id(index)
        leaves = [list(leaf) for leaf in self.leaves]
        for leaf in leaves:
            edit = EDITS.get(leaf[0])
            if edit is not None and (self.vendor != INTEL or leaf[0] not in AMD_ONLY):
                edit(leaf, self.topology, apic_id)
        leaves += self._topology_leaves(apic_id)
        return [(leaf[0], leaf[1], leaf[2], leaf[3], leaf[4], leaf[5], leaf[6]) for leaf in leaves]

    @property
    def _tells_dies(self) -> bool:
        """Leaf 0x1F is Intel's, and only of use where there are dies."""
        return self.vendor == INTEL and self.topology.dies > 1

    def _find(self, function: int) -> "Leaf | None":
        return next((leaf for leaf in self.leaves if leaf[0] == function), None)

    def _set_features(self, tsc_deadline: bool, long_apic_ids: bool) -> None:
        if leaf := self._find(1):
            leaf[ECX] |= HYPERVISOR | (TSC_DEADLINE if tsc_deadline else 0)
        if long_apic_ids and (leaf := self._find(KVM_FEATURES_LEAF)):
            leaf[EAX] |= MSI_EXT_DEST_ID

    def _set_address_width(self, max_phys_bits: int | None) -> None:
        if max_phys_bits is not None and (leaf := self._find(0x80000008)):
            leaf[EAX] = leaf[EAX] & ~0xFF | min(self.phys_bits, max_phys_bits)

    def _add_timing(self) -> None:
        """Say the frequencies, so that no guest has to measure them against a timer."""
        signature = self._find(KVM_SIGNATURE_LEAF)
        if signature and not self._find(KVM_TIMING_LEAF):
            signature[EAX] = max(signature[EAX], KVM_TIMING_LEAF)
            self.leaves.append([KVM_TIMING_LEAF, 0, 0, self.tsc_khz, APIC_TIMER_KHZ, 0, 0])
        if self.vendor == INTEL and (base := self._find(0)) and base[EAX] >= 0x15:
            self.leaves = [leaf for leaf in self.leaves if leaf[0] != 0x15]
            # TSC = crystal * EBX / EAX. Guests take the crystal for the APIC timer's clock, so say that one.
            # Linux multiplies the crystal in kHz by EBX in 32 bits: most ratios must be rounded for that.
            multiplier, divisor = _ratio(self.tsc_khz, APIC_TIMER_KHZ, 0xFFFFFFFF // APIC_TIMER_KHZ)
            self.leaves.append([0x15, 0, 0, divisor, multiplier, APIC_TIMER_KHZ * 1000, 0])

    def _topology_leaves(self, apic_id: int) -> "list[Leaf]":
        """Leaf 0xB, and 0x1F where there are dies to tell: one subleaf a level, then an empty one."""
        shape = self.topology
        levels = [
            (LEVEL_SMT, shape.thread_bits, shape.threads),
            (LEVEL_CORE, shape.package_bits, shape.per_package),
        ]
        leaves = _levels(0xB, levels, apic_id)
        if self._tells_dies:
            levels[1:] = [
                (LEVEL_CORE, shape.core_bits, shape.threads * shape.cores),
                (LEVEL_DIE, shape.package_bits, shape.per_package),
            ]
            leaves += _levels(0x1F, levels, apic_id)
        return leaves


def _ratio(value: int, unit: int, limit: int) -> tuple[int, int]:
    """``value / unit`` as a fraction, its numerator at most ``limit``: the last such convergent."""
    before, numerator, before_it, denominator = 0, 1, 1, 0
    while unit:
        whole, rest = divmod(value, unit)
        following = whole * numerator + before
        if following > limit:
            break
        before, numerator, before_it, denominator = (
            numerator, following, denominator, whole * denominator + before_it
        )  # fmt: skip
        value, unit = unit, rest
    return numerator, denominator


def _levels(function: int, levels: list[tuple[int, int, int]], apic_id: int) -> "list[Leaf]":
    leaves = [
        [function, index, SIGNIFICANT_INDEX, bits, count & 0xFFFF, level << 8 | index, apic_id]
        for index, (level, bits, count) in enumerate(levels)
    ]
    return [*leaves, [function, len(levels), SIGNIFICANT_INDEX, 0, 0, len(levels), apic_id]]


def _edit_1(leaf: "Leaf", shape: Topology, apic_id: int) -> None:
    ids = min(1 << shape.package_bits, 255)
    leaf[EBX] = leaf[EBX] & 0x0000FFFF | ids << 16 | (apic_id & 0xFF) << 24
    leaf[EDX] = leaf[EDX] & ~HTT | (HTT if shape.per_package > 1 else 0)


def _sharing(level: int, shape: Topology) -> int:
    """How many APIC ids share a cache of ``level``: a core its first two, a package the third."""
    return 1 << (shape.thread_bits if level < 3 else shape.package_bits)


def _edit_4(leaf: "Leaf", shape: Topology, _apic_id: int) -> None:
    """Intel's caches, one a subleaf; type 0 ends the list."""
    if leaf[EAX] & 0x1F == 0:
        return
    cores = min(1 << (shape.package_bits - shape.thread_bits), 64)
    sharing = min(_sharing(leaf[EAX] >> 5 & 7, shape), 4096)
    leaf[EAX] = leaf[EAX] & 0x3FFF | (sharing - 1) << 14 | (cores - 1) << 26


def _edit_amd_features(leaf: "Leaf", shape: Topology, _apic_id: int) -> None:
    leaf[ECX] = leaf[ECX] & ~CMP_LEGACY | (CMP_LEGACY if shape.per_package > 1 else 0)


def _edit_amd_size(leaf: "Leaf", shape: Topology, _apic_id: int) -> None:
    leaf[ECX] = leaf[ECX] & ~0xF0FF | min(shape.per_package - 1, 255) | shape.package_bits << 12


def _edit_amd_caches(leaf: "Leaf", shape: Topology, _apic_id: int) -> None:
    if leaf[EAX] & 0x1F:
        leaf[EAX] = leaf[EAX] & ~(0xFFF << 14) | (_sharing(leaf[EAX] >> 5 & 7, shape) - 1 & 0xFFF) << 14


def _edit_amd_ids(leaf: "Leaf", shape: Topology, apic_id: int) -> None:
    core = (apic_id & (1 << shape.package_bits) - 1) >> shape.thread_bits
    leaf[EAX] = apic_id
    leaf[EBX] = (shape.threads - 1) << 8 | core & 0xFF
    leaf[ECX] = apic_id >> shape.package_bits & 0xFF  # one node a package


EDITS: "dict[int, Callable[[Leaf, Topology, int], None]]" = {
    0x1: _edit_1,
    0x4: _edit_4,
    0x80000001: _edit_amd_features,
    0x80000008: _edit_amd_size,
    0x8000001D: _edit_amd_caches,
    0x8000001E: _edit_amd_ids,
}
AMD_ONLY = (0x80000001, 0x80000008, 0x8000001D, 0x8000001E)  # on Intel these bits are reserved

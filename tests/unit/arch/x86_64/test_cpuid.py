"""What a guest reads from CPUID, made from small sets of what KVM might support."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pileus.arch.x86_64.cpuid import AMD, INTEL, OTHER, Template, vendor_of
from pileus.arch.x86_64.topology import Topology

Entry = tuple[int, int, int, int, int, int, int]
TSC_KHZ = 2_445_361


def vendor_leaf(name: bytes, last: int) -> Entry:
    ebx, edx, ecx = (int.from_bytes(name[at : at + 4], "little") for at in (0, 4, 8))
    return (0, 0, 0, last, ebx, ecx, edx)


COMMON: list[Entry] = [
    (1, 0, 0, 0x000806F8, 0x05080800, 0x00200000, 0x10000000),  # another CPU's APIC id, HTT
    (0xB, 0, 1, 9, 9, 9, 9),  # the host's own topology
    (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
    (0x40000001, 0, 0, 0x01000000, 0, 0, 0),
    (0x80000008, 0, 0, 0x3030, 0, 0x7777, 0),
]
INTEL_SET: list[Entry] = [
    vendor_leaf(b"GenuineIntel", 0x16),
    *COMMON,
    (4, 0, 1, 0xFC01C121, 0x3F, 0x3F, 0),  # L1 data
    (4, 1, 1, 0xFC01C163, 0x3F, 0x3F, 0),  # L3
    (4, 2, 1, 0, 0, 0, 0),
    (0x15, 0, 0, 2, 200, 25_000_000, 0),
]
AMD_SET: list[Entry] = [
    vendor_leaf(b"AuthenticAMD", 0x10),
    *COMMON,
    (0x80000001, 0, 0, 0, 0, 1 << 22 | 2, 0),
    (0x8000001D, 0, 1, 0x3FFC121, 0, 0, 0),
    (0x8000001D, 3, 1, 0x3FFC163, 0, 0, 0),
    (0x8000001E, 0, 0, 77, 0x7777, 0x7777, 0),
    (0x80000026, 0, 1, 9, 9, 9, 9),
]


def template(supported: list[Entry], *shape: int, **more: bool | int) -> Template:
    options = {"tsc_khz": TSC_KHZ, "tsc_deadline": True} | more
    return Template(supported, Topology(*(shape or (1, 1, 1, 1))), **options)  # type: ignore[arg-type]


def leaf(entries: list[Entry], function: int, index: int = 0) -> tuple[int, int, int, int]:
    (found,) = [entry[3:] for entry in entries if entry[:2] == (function, index)]
    return found


@pytest.mark.parametrize(
    ("name", "vendor"),
    [(b"GenuineIntel", INTEL), (b"AuthenticAMD", AMD), (b"HygonGenuine", AMD), (b"x" * 12, OTHER)],
)
def test_the_vendor_is_read_in_the_order_of_cpuid(name: bytes, vendor: str) -> None:
    assert vendor_of([vendor_leaf(name, 1)]) == vendor


def test_leaf_1_has_the_vcpus_own_apic_id_and_says_hypervisor() -> None:
    entries = template(INTEL_SET, 2, 2, 1, 1).for_vcpu(3)
    _, ebx, ecx, edx = leaf(entries, 1)
    assert ebx >> 24 == 3
    assert ebx >> 16 & 0xFF == 4
    assert ebx & 0xFFFF == 0x0800, "CLFLUSH size is the host's"
    assert ecx >> 31 & 1
    assert ecx >> 24 & 1, "TSC deadline timer"
    assert edx >> 28 & 1, "HTT"


def test_a_single_cpu_has_no_htt_and_no_deadline_timer_that_kvm_lacks() -> None:
    _, _, ecx, edx = leaf(template(INTEL_SET, tsc_deadline=False).for_vcpu(0), 1)
    assert not edx >> 28 & 1
    assert not ecx >> 24 & 1


@pytest.mark.parametrize("supported", [INTEL_SET, AMD_SET], ids=["intel", "amd"])
def test_leaf_b_tells_threads_and_packages(supported: list[Entry]) -> None:
    entries = template(supported, 2, 3, 1, 2).for_vcpu(7)
    assert leaf(entries, 0xB, 0) == (1, 2, 0x100, 9)  # 1 bit of thread, 2 threads, SMT level, APIC id
    assert leaf(entries, 0xB, 1) == (3, 6, 0x201, 9)  # 3 bits below the package, 6 CPUs in it, core level
    assert leaf(entries, 0xB, 2) == (0, 0, 2, 9)


COUNTS = st.integers(1, 5)


@given(threads=COUNTS, cores=COUNTS, dies=COUNTS, packages=st.integers(1, 3))
def test_a_guest_finds_the_topology_again(threads: int, cores: int, dies: int, packages: int) -> None:
    """As Linux does: shift APIC ids by the widths told, and count what stays apart."""
    per_package = threads * cores * dies
    for supported in (INTEL_SET, AMD_SET):
        made = template(supported, threads, cores, dies, packages)
        vcpus = [made.for_vcpu(index) for index in range(per_package * packages)]
        ids = [leaf(vcpu, 0xB)[3] for vcpu in vcpus]
        core_shift, package_shift = leaf(vcpus[0], 0xB, 0)[0], leaf(vcpus[0], 0xB, 1)[0]
        assert len(set(ids)) == len(ids)
        assert len({each >> core_shift for each in ids}) == cores * dies * packages
        assert len({each >> package_shift for each in ids}) == packages
        assert (leaf(vcpus[0], 0xB, 0)[1], leaf(vcpus[0], 0xB, 1)[1]) == (threads, per_package)
        for vcpu, apic_id in zip(vcpus, ids, strict=True):
            assert leaf(vcpu, 1)[1] >> 24 == apic_id & 0xFF
            assert {entry[6] for entry in vcpu if entry[0] in (0xB, 0x1F)} == {apic_id}
        if supported is INTEL_SET and dies > 1:
            die_shift = leaf(vcpus[0], 0x1F, 1)[0]
            assert len({each >> die_shift for each in ids}) == dies * packages
            assert leaf(vcpus[0], 0x1F, 2)[0] == package_shift
        if supported is AMD_SET:
            assert leaf(vcpus[0], 0x80000008)[2] & 0xFF == per_package - 1
            assert leaf(vcpus[0], 0x80000008)[2] >> 12 & 0xF == package_shift
            own = [leaf(vcpu, 0x8000001E) for vcpu in vcpus]
            assert [each[0] for each in own] == ids
            assert len({(each[1] & 0xFF, each[2] & 0xFF) for each in own}) == cores * dies * packages
            assert {each[1] >> 8 & 0xFF for each in own} == {threads - 1}


def test_dies_show_in_leaf_1f_on_intel() -> None:
    entries = template(INTEL_SET, 1, 2, 2, 1).for_vcpu(3)
    assert leaf(entries, 0)[0] == 0x1F
    assert leaf(entries, 0x1F, 1) == (1, 2, 0x201, 3)
    assert leaf(entries, 0x1F, 2) == (2, 4, 0x502, 3)
    assert leaf(entries, 0x1F, 3) == (0, 0, 3, 3)


@pytest.mark.parametrize("supported", [INTEL_SET, AMD_SET], ids=["intel", "amd"])
def test_the_hosts_own_topology_never_shows(supported: list[Entry]) -> None:
    for entry in template(supported, 1, 4, 1, 1).for_vcpu(1):
        assert 9 not in entry[3:5], f"leaf {entry[0]:#x}"


def test_intels_caches_are_shared_as_the_topology_says() -> None:
    entries = template(INTEL_SET, 2, 4, 1, 1).for_vcpu(0)
    first, third = leaf(entries, 4, 0)[0], leaf(entries, 4, 1)[0]
    assert (first >> 14 & 0xFFF) + 1 == 2
    assert (third >> 14 & 0xFFF) + 1 == 8
    assert (first >> 26) + 1 == 4
    assert leaf(entries, 4, 2) == (0, 0, 0, 0)


def test_amd_says_the_same_in_its_own_leaves() -> None:
    entries = template(AMD_SET, 2, 4, 1, 2).for_vcpu(11)  # package 1, core 1, thread 1
    assert leaf(entries, 0x80000001)[2] == 1 << 22 | 1 << 1
    assert leaf(entries, 0x80000008)[2] & 0xF0FF == 7 | 3 << 12
    assert (leaf(entries, 0x8000001D, 0)[0] >> 14 & 0xFFF) + 1 == 2
    assert (leaf(entries, 0x8000001D, 3)[0] >> 14 & 0xFFF) + 1 == 8
    assert leaf(entries, 0x8000001E)[:3] == (11, 1 << 8 | 1, 1)


def test_intel_keeps_the_bits_that_only_amd_has() -> None:
    assert leaf(template(INTEL_SET, 1, 4, 1, 1).for_vcpu(0), 0x80000008)[2] == 0x7777


@pytest.mark.parametrize("khz", [1_000_000, 1_996_800, 2_000_000, 2_500_000, 3_831_000, 4_294_000])
def test_leaf_15_gives_a_round_tsc_frequency_exactly(khz: int) -> None:
    denominator, numerator, crystal, _ = leaf(template(INTEL_SET, tsc_khz=khz).for_vcpu(0), 0x15)
    assert crystal * numerator == khz * 1000 * denominator
    assert crystal == 1_000_000_000, "the clock of KVM's APIC timer"


@given(khz=st.integers(800_000, 6_000_000))
@example(khz=TSC_KHZ)
@example(khz=2_000_291)
def test_leaf_15_survives_the_arithmetic_of_linux(khz: int) -> None:
    """native_calibrate_tsc: unsigned int crystal_khz * ebx_numerator / eax_denominator."""
    denominator, numerator, crystal, _ = leaf(template(INTEL_SET, tsc_khz=khz).for_vcpu(0), 0x15)
    calibrated = ((crystal // 1000 * numerator) & 0xFFFFFFFF) // denominator
    assert abs(calibrated - khz) <= khz * 500e-6, "what NTP can still correct"


def test_the_timing_leaf_is_within_the_hypervisors_range() -> None:
    entries = template(AMD_SET).for_vcpu(0)
    assert leaf(entries, 0x40000000)[0] == 0x40000010
    assert leaf(entries, 0x40000010)[:2] == (TSC_KHZ, 1_000_000)


def test_long_apic_ids_are_offered_only_when_they_work() -> None:
    assert not leaf(template(AMD_SET).for_vcpu(0), 0x40000001)[0] >> 15 & 1
    assert leaf(template(AMD_SET, long_apic_ids=True).for_vcpu(0), 0x40000001)[0] >> 15 & 1


@pytest.mark.parametrize(("cap", "bits"), [(None, 0x30), (40, 40), (52, 0x30)])
def test_the_address_width_can_only_shrink(cap: int | None, bits: int) -> None:
    made = Template(INTEL_SET, Topology(1, 1, 1, 1), tsc_khz=1, tsc_deadline=True, max_phys_bits=cap)
    assert made.phys_bits == bits
    assert leaf(made.for_vcpu(0), 0x80000008)[0] == 0x3000 | bits


def test_one_vcpus_answer_does_not_change_anothers() -> None:
    made = template(INTEL_SET, 1, 2, 2, 1)
    first = made.for_vcpu(0)
    made.for_vcpu(3)
    assert made.for_vcpu(0) == first


def with_leaf(supported: list[Entry], function: int, *values: int) -> list[Entry]:
    """``supported`` with other EAX to EDX in leaf ``function``."""
    eax, ebx, ecx, edx = values
    kept = [entry for entry in supported if entry[0] != function]
    return [*kept, (function, 0, 0, eax, ebx, ecx, edx)]


@pytest.mark.parametrize("supported", [INTEL_SET, AMD_SET], ids=["intel", "amd"])
@pytest.mark.parametrize("shape", [(2, 200, 1, 1), (1, 1, 1, 1024), (8, 1024, 8, 2)], ids=str)
def test_every_register_holds_32_bits_however_many_cpus(
    supported: list[Entry], shape: tuple[int, int, int, int]
) -> None:
    threads, cores, dies, packages = shape
    last = threads * cores * dies * packages - 1
    for entry in template(supported, *shape).for_vcpu(last):
        assert all(0 <= value < 1 << 32 for value in entry), f"leaf {entry[0]:#x}"


def test_counts_that_do_not_fit_their_field_stay_at_its_end() -> None:
    entries = template(INTEL_SET, 8, 1024, 1, 2).for_vcpu(8 * 1024 + 300)
    apic_id = (1 << 13) + 300
    _, ebx, _, _ = leaf(entries, 1)
    assert (ebx >> 16 & 0xFF, ebx >> 24) == (255, apic_id & 0xFF)
    third = leaf(entries, 4, 1)[0]
    assert (third >> 26) + 1 == 64
    assert (third >> 14 & 0xFFF) + 1 == 4096
    assert leaf(entries, 0xB, 0)[3] == apic_id, "all 32 bits are here"
    amd = template(AMD_SET, 8, 1024, 1, 2).for_vcpu(8 * 1024 + 8 * 300)
    assert leaf(amd, 0x80000008)[2] == 0x0700 | 255 | 13 << 12, "bits 8 to 11 are the host's"
    assert leaf(amd, 0x8000001E)[1] == 7 << 8 | 300 & 0xFF


def test_leaf_1_counts_ids_and_not_cpus() -> None:
    _, ebx, _, _ = leaf(template(INTEL_SET, 2, 3, 1, 1).for_vcpu(0), 1)
    assert ebx >> 16 & 0xFF == 8, "three cores take two bits"


def test_a_core_has_its_second_cache_to_itself() -> None:
    second = (4, 1, 1, 0xFC01F143, 0x3F, 0x3F, 0)
    supported = [second if entry[:2] == (4, 1) else entry for entry in INTEL_SET]
    eax = leaf(template(supported, 2, 4, 1, 1).for_vcpu(0), 4, 1)[0]
    assert (eax >> 14 & 0xFFF) + 1 == 2
    assert eax & 0x3FFF == 0x3143, "level, type and flags are the host's"


@pytest.mark.parametrize("function", [0xB, 0x1F])
def test_topology_leaves_say_that_they_have_subleaves(function: int) -> None:
    entries = template(INTEL_SET, 2, 2, 2, 1).for_vcpu(0)
    assert {entry[2] for entry in entries if entry[0] == function} == {1}


def test_what_the_hypervisor_says_beyond_ours_is_kept() -> None:
    supported = with_leaf(INTEL_SET, 0x40000000, 0x40000082, 1, 2, 3)
    assert leaf(template(supported).for_vcpu(0), 0x40000000)[0] == 0x40000082
    supported = with_leaf(supported, 0x40000010, 7, 8, 0, 0)
    entries = template(supported).for_vcpu(0)
    assert leaf(entries, 0x40000010) == (7, 8, 0, 0)


@pytest.mark.parametrize(("last", "shown"), [(0x14, 0x1F), (0x20, 0x20)])
def test_dies_raise_the_last_leaf_and_never_lower_it(last: int, shown: int) -> None:
    supported = [vendor_leaf(b"GenuineIntel", last), *INTEL_SET[1:]]
    assert leaf(template(supported, 1, 1, 2, 1).for_vcpu(0), 0)[0] == shown


def test_amd_gets_none_of_intels_leaves() -> None:
    supported = [vendor_leaf(b"AuthenticAMD", 0x20), *AMD_SET[1:]]
    functions = {entry[0] for entry in template(supported, 1, 2, 2, 1).for_vcpu(0)}
    assert functions.isdisjoint({0x15, 0x1F})


def test_no_tsc_leaf_is_added_beyond_the_last_one() -> None:
    supported = [vendor_leaf(b"GenuineIntel", 0x14), *(entry for entry in INTEL_SET[1:] if entry[0] != 0x15)]
    assert 0x15 not in {entry[0] for entry in template(supported).for_vcpu(0)}


def test_a_cpu_that_does_not_tell_its_address_width_has_36_bits() -> None:
    assert template([vendor_leaf(b"GenuineIntel", 1)]).phys_bits == 36

"""The virtual IOMMU by its requests, and what it keeps devices from."""

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pileus.config.model import DiskConfig
from pileus.errors import HostError
from pileus.memory._iommu import Endpoint, Iommu
from pileus.testing import F_INDIRECT, F_WRITE, FakeDriver, Used
from pileus.testing.memory import PAGE
from pileus.virtio import status
from pileus.virtio.device import ACCESS_PLATFORM
from pileus.virtio.devices.blk import open_disk
from pileus.virtio.devices.iommu import BYPASS, DOMAIN_LAST, INPUT_LAST, IommuDevice
from pileus.virtio.devices.rng import Rng

READY = status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK | status.DRIVER_OK
ATTACH, DETACH, MAP, UNMAP, PROBE = 1, 2, 3, 4, 5
OK, UNSUPP, INVAL, RANGE, NOENT, NOMEM = 0, 2, 4, 5, 6, 8
READ, WRITE = 1, 2
F_BYPASS_CONFIG = 1 << 6
R_DOMAIN, R_MAPPING = 1, 2
HAS_ADDRESS = 1 << 8
DISK, NET = 0x08, 0x10


class Guest(FakeDriver):
    """The driver of an IOMMU with two endpoints."""

    def __init__(self, device: IommuDevice, **more: Any) -> None:
        super().__init__(device, **more)
        self.iommu = device

    def ask(self, request: bytes, room: int = 4) -> bytes:
        """What comes back for ``request``; empty where the device did not write."""
        head = self.add([request], [room])
        self.kick()
        (used,) = self.used()
        assert used.head == head
        return self.read(head)[: used.length]

    def status_of(self, request: bytes) -> int:
        tail = self.ask(request)
        assert len(tail) == 4
        assert tail[1:] == bytes(3)
        return tail[0]

    def attach(self, domain: int, endpoint: int, flags: int = 0, reserved: int = 0) -> int:
        return self.status_of(struct.pack("<B3xIIII", ATTACH, domain, endpoint, flags, reserved))

    def detach(self, domain: int, endpoint: int) -> int:
        return self.status_of(struct.pack("<B3xII8x", DETACH, domain, endpoint))

    def map(self, domain: int, first: int, last: int, gpa: int, flags: int = READ | WRITE) -> int:
        return self.status_of(struct.pack("<B3xIQQQI", MAP, domain, first, last, gpa, flags))

    def unmap(self, domain: int, first: int, last: int) -> int:
        return self.status_of(struct.pack("<B3xIQQ4x", UNMAP, domain, first, last))

    def probe(self, endpoint: int, room: int = 68) -> bytes:
        return self.ask(struct.pack("<B3xI64x", PROBE, endpoint), room)


def make() -> IommuDevice:
    device = IommuDevice("iommu0")
    device.core.add_endpoint(DISK, "disk")
    device.core.add_endpoint(NET, "net")
    return device


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest(make()) as guest:
        yield guest


# -- configuration --------------------------------------------------------------------------------


def test_it_says_what_it_can_do(guest: Guest) -> None:
    assert guest.offered & 0xFF == 0b1010111  # ranges, MAP/UNMAP, PROBE, BYPASS_CONFIG
    sizes, low, high, first, last, probe, bypass = struct.unpack("<QQQIIIB3x", guest.read_config())
    assert sizes == 4096 | 2 << 20 | 1 << 30
    assert (low, high) == (0, (1 << 48) - 1)
    assert (first, last) == (0, 0xFFFF)
    assert (probe, bypass) == (64, 1)


def test_bypass_is_a_field_of_one_bit_that_outlives_a_reset(guest: Guest) -> None:
    endpoint = guest.iommu.core.endpoints[DISK]
    assert endpoint.translate(5, WRITE) == (5, (1 << 64) - 5)
    guest.write_config(BYPASS, b"\0")
    assert guest.read_config(BYPASS, 1) == b"\0"
    assert endpoint.translate(5, WRITE) == R_DOMAIN
    guest.write_config(BYPASS, b"\2")
    assert guest.read_config(BYPASS, 1) == b"\0"
    guest.start()
    assert guest.read_config(BYPASS, 1) == b"\0"
    guest.write_config(BYPASS, b"\1")
    assert guest.read_config(BYPASS, 1) == b"\1"


def test_a_driver_that_does_not_know_bypass_cannot_change_it() -> None:
    with Guest(make(), features=1 << 2) as guest:
        guest.write_config(BYPASS, b"\0")
        assert guest.read_config(BYPASS, 1) == b"\1"
        assert guest.attach(1, DISK, flags=1) == INVAL
        assert guest.probe(DISK) == b"", "without PROBE there is no such request"


def test_without_map_and_unmap_there_are_no_such_requests() -> None:
    with Guest(make(), features=0) as guest:
        assert guest.attach(1, DISK) == OK
        assert guest.ask(struct.pack("<B3xIQQQI", MAP, 1, 0, 4095, 0, 1)) == b""
        assert guest.ask(struct.pack("<B3xIQQ4x", UNMAP, 1, 0, 4095)) == b""


# -- requests -------------------------------------------------------------------------------------


def test_a_mapping_is_what_its_endpoints_reach(guest: Guest) -> None:
    assert guest.attach(7, DISK) == OK
    assert guest.map(7, 0x10000, 0x12FFF, 0x700000, READ) == OK
    disk, net = (guest.iommu.core.endpoints[number] for number in (DISK, NET))
    assert disk.translate(0x11001, READ) == (0x701001, 0x1FFF)
    assert disk.translate(0x11001, WRITE) == R_MAPPING
    assert guest.attach(7, NET) == OK
    assert net.translate(0x10000, READ) == (0x700000, 0x3000)
    assert guest.detach(7, DISK) == OK
    assert guest.unmap(7, 0x10000, 0x12FFF) == OK
    assert net.translate(0x10000, READ) == R_MAPPING


@pytest.mark.parametrize(
    ("bad", "expected"),
    {
        "reserved is not zero": ((1, DISK, 0, 1), INVAL),
        "an unknown flag": ((1, DISK, 2, 0), INVAL),
        "no such endpoint": ((1, 0x18, 0, 0), NOENT),
        "no such domain can be": ((DOMAIN_LAST + 1, DISK, 0, 0), RANGE),
    }.values(),
)
def test_what_attach_refuses(guest: Guest, bad: tuple[int, int, int, int], expected: int) -> None:
    assert guest.attach(*bad) == expected
    assert guest.iommu.core.domains == {}


def test_a_bypass_domain_has_no_mappings(guest: Guest) -> None:
    assert guest.attach(1, DISK, flags=1) == OK
    assert guest.attach(1, NET) == INVAL
    assert guest.map(1, 0, 4095, 0) == INVAL
    assert guest.unmap(1, 0, 4095) == INVAL
    assert guest.attach(1, NET, flags=1) == OK
    assert guest.attach(2, NET) == OK
    assert guest.attach(2, DISK, flags=1) == INVAL


def test_what_detach_refuses(guest: Guest) -> None:
    guest.attach(1, DISK)
    assert guest.detach(1, 0x18) == NOENT
    assert guest.detach(2, DISK) == INVAL
    assert guest.detach(1, NET) == INVAL
    assert guest.detach(1, DISK) == OK
    assert guest.detach(1, DISK) == INVAL


BAD_MAPS = {
    "virt_start not on a page": ((1, 1, 4095, 0, READ), RANGE),
    "virt_end not on a page": ((1, 0, 4094, 0, READ), RANGE),
    "phys_start not on a page": ((1, 0, 4095, 1, READ), RANGE),
    "backwards": ((1, 8192, 4095, 0, READ), RANGE),
    "past the input range": ((1, 1 << 48, (1 << 48) + 4095, 0, READ), RANGE),
    "to the end of 64 bits": ((1, 0, (1 << 64) - 1, 0, READ), RANGE),
    "physical addresses that wrap": ((1, 0, 8191, (1 << 64) - 4096, READ), RANGE),
    "an unknown flag": ((1, 0, 4095, 0, 8), INVAL),
    "the flag for MMIO, which was not offered": ((1, 0, 4095, 0, 5), INVAL),
    "no such domain": ((2, 0, 4095, 0, READ), NOENT),
    "what is mapped": ((1, 0x10000, 0x10FFF, 0, READ), INVAL),
    "around what is mapped": ((1, 0xF000, 0x11FFF, 0, READ), INVAL),
    "where interrupts go": ((1, 0xFEE00000, 0xFEE00FFF, 0, READ), INVAL),
    "around where interrupts go": ((1, 0xFE000000, 0xFFFFFFFF, 0, READ), INVAL),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_what_map_refuses(guest: Guest, name: str) -> None:
    bad, expected = BAD_MAPS[name]
    guest.attach(1, DISK)
    guest.map(1, 0x10000, 0x10FFF, 0)
    assert guest.map(*bad) == expected
    assert len(list(guest.iommu.core.domains[1].mappings)) == 1


def test_the_last_page_of_the_input_range_can_be_mapped(guest: Guest) -> None:
    guest.attach(1, DISK)
    assert guest.map(1, INPUT_LAST - 4095, INPUT_LAST, 0) == OK
    assert guest.map(1, 0, (1 << 30) - 1, 1 << 30) == OK


def test_unmap_takes_whole_mappings_only(guest: Guest) -> None:
    """The seven examples of 5.13.6.6, in pages."""

    def page(first: int, last: int) -> tuple[int, int]:
        return first * PAGE, last * PAGE + PAGE - 1

    for mapped, unmapped, expected, left in (
        ([], (0, 4), OK, 0),
        ([(0, 9)], (0, 9), OK, 0),
        ([(0, 4), (5, 9)], (0, 9), OK, 0),
        ([(0, 9)], (0, 4), RANGE, 1),
        ([(0, 4), (5, 9)], (0, 4), OK, 1),
        ([(0, 4)], (0, 9), OK, 0),
        ([(0, 4), (10, 14)], (0, 14), OK, 0),
    ):
        guest.attach(1, DISK)
        for each in mapped:
            assert guest.map(1, *page(*each), 0) == OK
        assert guest.unmap(1, *page(*unmapped)) == expected
        assert guest.iommu.core.domains[1].mappings.count == left
        guest.detach(1, DISK)


def test_unmap_knows_no_other_domains(guest: Guest) -> None:
    assert guest.unmap(1, 0, 4095) == NOENT
    guest.attach(1, DISK)
    assert guest.unmap(1, 1, 0) == RANGE


def test_mappings_have_an_end() -> None:
    device = make()
    device.core = Iommu(limit=2)
    device.core.add_endpoint(DISK, "disk")
    with Guest(device) as guest:
        guest.attach(1, DISK)
        assert [guest.map(1, page * PAGE, page * PAGE + 4095, 0) for page in range(3)] == [OK, OK, NOMEM]


def test_probe_tells_where_interrupts_go(guest: Guest) -> None:
    answer = guest.probe(DISK)
    assert answer[:24] == struct.pack("<HHB3xQQ", 1, 20, 1, 0xFEE00000, 0xFEEFFFFF)
    assert answer[24:] == bytes(40 + 4)
    assert guest.probe(0x18) == bytes(64) + bytes([NOENT, 0, 0, 0])
    assert guest.probe(DISK, room=40) == bytes(36) + bytes([INVAL, 0, 0, 0])


@pytest.mark.parametrize("kind", [0, 6, 255])
def test_an_unknown_request_comes_back_untouched(guest: Guest, kind: int) -> None:
    assert guest.ask(bytes([kind]) + bytes(60), 68) == b""


@pytest.mark.parametrize("kind", [ATTACH, DETACH, MAP, UNMAP, PROBE])
def test_a_request_that_is_cut_short_comes_back_untouched(guest: Guest, kind: int) -> None:
    size = {ATTACH: 20, DETACH: 20, MAP: 36, UNMAP: 28, PROBE: 72}[kind]
    for length in range(1, size):
        assert guest.ask(bytes([kind]) + bytes(length - 1), 68) == b""
    assert guest.ask(bytes([kind]) + bytes(size - 1), 3) == b""
    assert guest.status == READY


def test_a_reset_leaves_no_endpoint_in_a_domain(guest: Guest) -> None:
    guest.attach(1, DISK)
    guest.start()
    assert guest.iommu.core.domains == {}
    assert guest.map(1, 0, 4095, 0) == NOENT


# -- the same, by a slow twin ---------------------------------------------------------------------


class Twin:
    """Domains as dictionaries of pages, from the specification."""

    def __init__(self) -> None:
        self.endpoints: dict[int, int | None] = {DISK: None, NET: None}
        self.bypass: dict[int, bool] = {}
        # domain → page → gpa, flags, its mapping
        self.pages: dict[int, dict[int, tuple[int, int, object]]] = {}

    def attach(self, domain: int, endpoint: int, bypass: bool) -> int:
        if endpoint not in self.endpoints:
            return NOENT
        if domain in self.bypass and self.bypass[domain] != bypass:
            return INVAL
        if self.endpoints[endpoint] != domain:
            self._leave(endpoint)
            self.endpoints[endpoint] = domain
            self.bypass.setdefault(domain, bypass)
            self.pages.setdefault(domain, {})
        return OK

    def _leave(self, endpoint: int) -> None:
        domain, self.endpoints[endpoint] = self.endpoints[endpoint], None
        if domain is not None and domain not in self.endpoints.values():
            del self.bypass[domain], self.pages[domain]

    def detach(self, domain: int, endpoint: int) -> int:
        if endpoint not in self.endpoints:
            return NOENT
        if self.endpoints[endpoint] != domain:
            return INVAL
        self._leave(endpoint)
        return OK

    def map(self, domain: int, first: int, count: int, target: int, flags: int) -> int:
        if domain not in self.pages:
            return NOENT
        if self.bypass[domain] or any(page in self.pages[domain] for page in range(first, first + count)):
            return INVAL
        one = object()
        for index in range(count):
            self.pages[domain][first + index] = target + index, flags, one
        return OK

    def unmap(self, domain: int, first: int, count: int) -> int:
        if domain not in self.pages:
            return NOENT
        if self.bypass[domain]:
            return INVAL
        inside = {page for page in self.pages[domain] if first <= page < first + count}
        gone = {self.pages[domain][page][2] for page in inside}
        if any(one in gone and page not in inside for page, (_, _, one) in self.pages[domain].items()):
            return RANGE
        for page in inside:
            del self.pages[domain][page]
        return OK

    def translate(self, endpoint: int, page: int, access: int) -> int:
        """The page it is; or less than zero."""
        domain = self.endpoints[endpoint]
        if domain is None or self.bypass[domain]:
            return page  # the configuration says bypass
        target, flags, _ = self.pages[domain].get(page, (0, 0, None))
        return target if flags & access else -R_MAPPING


domains = st.integers(0, 2)
endpoints = st.sampled_from([DISK, DISK, NET, NET, 0x18])
pages = st.integers(0, 9)


class Compare(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.guest, self.twin = Guest(make()), Twin()

    def teardown(self) -> None:
        self.guest.close()

    @rule(domain=domains, endpoint=endpoints, bypass=st.sampled_from([False, False, False, True]))
    def attach(self, domain: int, endpoint: int, bypass: bool) -> None:
        assert self.guest.attach(domain, endpoint, int(bypass)) == self.twin.attach(domain, endpoint, bypass)

    @rule(domain=domains, endpoint=endpoints)
    def detach(self, domain: int, endpoint: int) -> None:
        assert self.guest.detach(domain, endpoint) == self.twin.detach(domain, endpoint)

    @rule(domain=domains, first=pages, count=st.integers(1, 4), where=pages, flags=st.integers(0, 3))
    def map(self, domain: int, first: int, count: int, where: int, flags: int) -> None:
        last = (first + count) * PAGE - 1
        assert self.guest.map(domain, first * PAGE, last, where * PAGE, flags) == self.twin.map(
            domain, first, count, where, flags
        )

    @rule(domain=domains, first=pages, count=st.integers(1, 10))
    def unmap(self, domain: int, first: int, count: int) -> None:
        last = (first + count) * PAGE - 1
        assert self.guest.unmap(domain, first * PAGE, last) == self.twin.unmap(domain, first, count)

    @rule()
    def save_and_restore(self) -> None:
        self.guest.iommu.pause()
        state = self.guest.control.state()
        self.guest.iommu = make()
        self.guest.move(self.guest.iommu, state)
        again = self.guest.control.state()
        assert again["device"] == state["device"]

    @invariant()
    def endpoints_reach_the_same(self) -> None:
        for number, endpoint in self.guest.iommu.core.endpoints.items():
            for page in range(12):
                for access in (READ, WRITE):
                    found = endpoint.translate(page * PAGE, access)
                    expected = self.twin.translate(number, page, access)
                    assert (-found if isinstance(found, int) else found[0] // PAGE) == expected


Compare.TestCase.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCompare = Compare.TestCase


# -- saving ---------------------------------------------------------------------------------------


def test_a_state_that_cannot_be_is_refused(guest: Guest) -> None:
    guest.attach(1, DISK)
    guest.map(1, 0, 4095, 0)
    state = guest.iommu.state()
    domain = state["domains"][0]
    wrong: list[dict[str, object]] = [
        {"endpoints": [0x18]},
        {"endpoints": [DISK, DISK]},
        {"number": DOMAIN_LAST + 1},
        {"number": -1},
        {"mappings": [[0, 4095, 0, 3], [0, 4095, 0, 3]]},
        {"mappings": [[1, 4095, 0, 3]]},
        {"mappings": [[-4096, 4095, 0, 3]]},
        {"endpoints": []},
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="iommu0: "):
            make().restore({"bypass": True, "domains": [{**domain, **bad}]})


# -- faults ---------------------------------------------------------------------------------------


class Fault(NamedTuple):
    reason: int
    flags: int
    endpoint: int
    address: int


class Pair:
    """An entropy device behind an IOMMU, each with its driver."""

    def __init__(self) -> None:
        self.iommu = IommuDevice("iommu0", bypass=False)
        self.rng = Rng("rng0", source=lambda count: b"\xa5" * count)
        self.iommu.add(self.rng, DISK)
        assert isinstance(self.rng.iommu, Endpoint)
        self.endpoint = self.rng.iommu
        self.guest = Guest(self.iommu)
        self.driver = FakeDriver(self.rng)
        assert self.driver.scrambled is not None
        self.scrambled = self.driver.scrambled

    def close(self) -> None:
        self.driver.close()
        self.guest.close()

    def offer_buffers(self, count: int) -> list[int]:
        return [self.guest.add(writable=[24], queue=1) for _ in range(count)]

    def faults(self) -> list[Fault]:
        self.guest.serve()
        found = []
        for used in self.guest.used(1):
            assert used.length == 24
            reason, flags, endpoint, reserved, address = struct.unpack(
                "<B3xIIIQ", self.guest.read(used.head, 1)
            )
            assert reserved == 0
            found.append(Fault(reason, flags, endpoint, address))
        return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_only_the_chain_that_is_not_mapped_fails_and_the_fault_is_reported(pair: Pair) -> None:
    pair.offer_buffers(2)
    driver = pair.driver
    good, bad = driver.add(writable=[16]), driver.add(writable=[64, PAGE * 3])
    last = driver.add(writable=[8])
    target = driver.rings[0].blocks(bad)[1].gpa
    pair.scrambled.unmap(pair.endpoint, (target // PAGE + 1) * PAGE)
    driver.kick()
    assert sorted(driver.used()) == [Used(good, 16), Used(bad, 0), Used(last, 8)]
    assert driver.read(good) == b"\xa5" * 16
    assert driver.read(last) == b"\xa5" * 8
    assert driver.status == READY
    assert driver.calls() == 1 or driver.calls() == 2
    assert pair.faults() == [Fault(R_MAPPING, WRITE | HAS_ADDRESS, DISK, (target // PAGE + 1) * PAGE)]


def test_what_is_mapped_for_reading_is_not_written(pair: Pair) -> None:
    pair.offer_buffers(1)
    pair.driver.rings[0].heap.take(2 * PAGE)  # so that the buffer is on no page of the rings
    head = pair.driver.add(writable=[16])
    iova = pair.driver.rings[0].blocks(head)[0].gpa
    before = pair.scrambled.read(iova, 16)
    pair.scrambled.unmap(pair.endpoint, iova, 16)
    assert pair.endpoint.domain is not None
    first = iova // PAGE * PAGE
    gpa = pair.scrambled.gpa(first)
    pair.iommu.core.map(pair.endpoint.domain, first, first + PAGE - 1, gpa, READ)
    pair.driver.kick()
    assert pair.driver.used() == [Used(head, 0)]
    assert pair.scrambled.read(iova, 16) == before
    assert pair.faults() == [Fault(R_MAPPING, WRITE | HAS_ADDRESS, DISK, iova)]


def test_an_indirect_table_that_is_not_mapped_is_a_fault_too(pair: Pair) -> None:
    pair.offer_buffers(1)
    pair.driver.write_descriptor(0, gpa=1 << 40, length=16, flags=F_INDIRECT)
    pair.driver.offer(0)
    pair.driver.kick()
    assert pair.driver.used() == [Used(0, 0)]
    assert pair.faults() == [Fault(R_MAPPING, READ | HAS_ADDRESS, DISK, 1 << 40)]


def test_an_endpoint_that_is_detached_has_no_rings_any_more(pair: Pair) -> None:
    pair.offer_buffers(4)
    pair.driver.add(writable=[16])
    pair.iommu.core.detach(pair.endpoint)
    pair.driver.kick()
    assert pair.driver.used() == []
    assert pair.driver.status == READY | status.NEEDS_RESET
    assert {fault.reason for fault in pair.faults()} == {R_DOMAIN}
    pair.scrambled.map(pair.endpoint)
    pair.driver.start()
    assert pair.driver.status == READY


def test_rings_whose_mapping_goes_stop_the_device(pair: Pair) -> None:
    for which in ("descriptors", "available", "used_ring"):
        pair.scrambled.unmap(pair.endpoint, getattr(pair.driver.rings[0], which))
        pair.driver.kick()
        assert pair.driver.status == READY | status.NEEDS_RESET
        pair.scrambled.map(pair.endpoint)
        pair.driver.start()
        assert pair.driver.status == READY


def test_rings_that_are_mapped_elsewhere_are_found_there(pair: Pair) -> None:
    """The driver copies them, then maps the same IOVAs to the copies."""
    ring, core, domain = pair.driver.rings[0], pair.iommu.core, pair.endpoint.domain
    assert domain is not None
    first = ring.descriptors // PAGE
    last = (ring.used_ring + 6 + 8 * ring.size) // PAGE
    for page in range(first, last + 1):
        data = pair.scrambled.read(page * PAGE, PAGE)
        spare = pair.driver.HIGH_RAM + page * PAGE
        pair.driver.memory.write(spare, data)
        pair.scrambled.unmap(pair.endpoint, page * PAGE)
        assert core.map(domain, page * PAGE, page * PAGE + PAGE - 1, spare, READ | WRITE) == 0
        pair.scrambled.pages[page] = spare // PAGE
    head = pair.driver.add(writable=[16])
    pair.driver.kick()
    assert pair.driver.used() == [Used(head, 16)]


def test_faults_wait_for_buffers_and_the_rest_is_counted(pair: Pair) -> None:
    for _ in range(80):
        pair.driver.write_descriptor(0, gpa=1 << 40, length=16, flags=F_WRITE)
        pair.driver.offer(0)
        pair.driver.kick()
        pair.driver.rings[0].take_used()
    assert pair.faults() == []
    assert pair.iommu.counters()["faults_dropped"] == 80 - 64
    pair.offer_buffers(100)
    pair.guest.kick(1)
    assert len(pair.faults()) == 64
    assert pair.guest.status == READY


def test_a_buffer_too_small_for_a_fault_stops_the_iommu(pair: Pair) -> None:
    pair.guest.add(writable=[23], queue=1)
    pair.driver.write_descriptor(0, gpa=1 << 40, length=16, flags=F_WRITE)
    pair.driver.offer(0)
    pair.driver.kick()
    pair.guest.serve()
    assert pair.guest.status == READY | status.NEEDS_RESET


def test_a_driver_that_ignores_the_iommu_does_not_get_the_device() -> None:
    rng = Rng("rng0")
    rng.iommu = Iommu().add_endpoint(8, "rng0")
    with FakeDriver(rng, start=False) as driver:
        assert driver.offered & ACCESS_PLATFORM
        driver.control.set_status(status.ACKNOWLEDGE | status.DRIVER)
        driver.write_features(driver.offered & ~ACCESS_PLATFORM)
        driver.control.set_status(READY)
        assert driver.status == status.ACKNOWLEDGE | status.DRIVER


def test_buffers_that_are_scattered_are_gathered(pair: Pair) -> None:
    """More pieces than a chain can have are refused, and nobody else suffers."""
    head = pair.driver.add(writable=[20 * PAGE])
    pair.driver.kick()
    assert pair.driver.used() == [Used(head, 64 << 10)]
    assert pair.driver.read(head)[: 64 << 10] == b"\xa5" * (64 << 10)
    pair.driver.start()
    head = pair.driver.add(writable=[1025 * PAGE])
    pair.driver.kick()
    assert pair.driver.used() == [Used(head, 0)]
    head = pair.driver.add(writable=[1000 * PAGE])
    pair.driver.kick()
    assert pair.driver.used() == [Used(head, 64 << 10)]
    assert pair.driver.status == READY


# -- a disk ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FakeDriver]:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(1 << 20))
    device = open_disk(DiskConfig(path=str(path), image_type="raw"), 0)
    device.iommu = Iommu(bypass=False).add_endpoint(DISK, "disk")
    with FakeDriver(device) as driver:
        yield driver


def read_request(sector: int) -> bytes:
    return struct.pack("<IIQ", 0, 0, sector)


def test_a_request_that_is_not_mapped_ends_as_an_error(disk: FakeDriver) -> None:
    """Its status says so, where that is mapped: a driver may look at nothing else."""
    endpoint, scrambled = disk.device.iommu, disk.scrambled
    assert isinstance(endpoint, Endpoint)
    assert scrambled is not None
    head = disk.add([read_request(0)], [8 * PAGE, PAGE, 1])
    data = disk.rings[0].blocks(head)[1].gpa
    scrambled.unmap(endpoint, data + PAGE)
    disk.kick()
    assert disk.wait() == [Used(head, 0)]
    assert disk.read(head)[-1] == 1
    assert disk.status == READY


def test_unmapping_under_load_is_safe(disk: FakeDriver) -> None:
    """Another thread takes pages away and gives them back, while requests come and go."""
    endpoint, scrambled = disk.device.iommu, disk.scrambled
    assert isinstance(endpoint, Endpoint)
    assert scrambled is not None
    image = disk.device.image  # type: ignore[attr-defined]
    with open(image.path, "rb") as file:
        content = file.read()
    domain = endpoint.domain
    assert domain is not None
    rings = {(disk.rings[0].used_ring + 6 + 8 * 128) // PAGE + index for index in range(2)}
    victims = [page for page in range(20, 60) if page not in rings]
    done = threading.Event()

    def unmap() -> None:
        while not done.is_set():
            for page in victims:
                endpoint.iommu.unmap(domain, page * PAGE, page * PAGE + PAGE - 1)
                endpoint.iommu.map(
                    domain, page * PAGE, page * PAGE + PAGE - 1, scrambled.pages[page] * PAGE, READ | WRITE
                )

    thread = threading.Thread(target=unmap)
    thread.start()
    good = bad = 0
    deadline = time.monotonic() + 60
    try:
        while (good < 100 or bad < 3) and time.monotonic() < deadline:
            heads = [disk.add([read_request(8 * index)], [6 * PAGE, 1]) for index in range(8)]
            disk.kick()
            used = dict(disk.wait(count=len(heads)))
            for index, head in enumerate(heads):
                if used[head]:
                    assert disk.read(head) == content[8 * 512 * index :][: 6 * PAGE] + b"\0"
                    good += 1
                else:
                    bad += 1
            disk.rings[0]._forget_returned()
    finally:
        done.set()
        thread.join()
    assert good >= 100
    assert bad >= 3
    assert disk.status == READY


# -- devices of the host ---------------------------------------------------------------------------------

HOST_DEVICE = 0x18
ALL = [(0, 0xFFFF, 0, READ | WRITE)]


class FakeSpace:
    """Remembers what it sees, by the rules of the kernel; ``room`` mappings fit in."""

    def __init__(self, last: int = (1 << 39) - 1, room: int = 100) -> None:
        self.last = last
        self.room = room
        self.seen: list[tuple[int, int, int, int]] = []
        self.locked = True

    def open_all(self) -> None:
        assert not self.seen
        if not self.locked:
            raise HostError("map", "guest memory", "no")
        self.seen = list(ALL)

    def map(self, first: int, last: int, gpa: int, access: int) -> None:
        assert all(last < other[0] or first > other[1] for other in self.seen)
        if len(self.seen) == self.room:
            raise OSError(errno.ENOSPC, "full")
        self.seen.append((first, last, gpa, access))

    def unmap(self, first: int, last: int) -> None:
        inside = [each for each in self.seen if first <= each[0] and each[1] <= last]
        outside = [each for each in self.seen if last < each[0] or first > each[1]]
        assert len(inside) + len(outside) == len(self.seen), "a mapping would be cut"
        self.seen = outside


@pytest.fixture
def space(guest: Guest) -> FakeSpace:
    space = FakeSpace()
    guest.iommu.add_host_device(HOST_DEVICE, "nvme", space)
    return space


def test_a_device_of_the_host_sees_all_or_what_its_domain_maps(guest: Guest, space: FakeSpace) -> None:
    assert space.seen == ALL  # bypass, until the driver says otherwise
    assert guest.attach(1, HOST_DEVICE) == OK
    assert space.seen == []
    assert guest.map(1, 0x10000, 0x1FFFF, 0x40000) == OK
    assert guest.map(1, 0x20000, 0x20FFF, 0x90000, READ) == OK
    assert space.seen == [(0x10000, 0x1FFFF, 0x40000, READ | WRITE), (0x20000, 0x20FFF, 0x90000, READ)]
    assert guest.unmap(1, 0x18000, 0x20FFF) == RANGE
    assert len(space.seen) == 2
    assert guest.unmap(1, 0, (1 << 64) - 1) == OK
    assert space.seen == []
    assert guest.map(1, 0x10000, 0x1FFFF, 0x40000) == OK
    assert guest.detach(1, HOST_DEVICE) == OK
    assert space.seen == ALL


def test_a_device_of_the_host_takes_the_mappings_of_a_domain_that_is_there(
    guest: Guest, space: FakeSpace
) -> None:
    assert guest.attach(1, DISK) == OK
    assert guest.map(1, 0x10000, 0x1FFFF, 0x40000) == OK
    assert space.seen == ALL
    assert guest.attach(1, HOST_DEVICE) == OK
    assert space.seen == [(0x10000, 0x1FFFF, 0x40000, READ | WRITE)]
    assert guest.attach(1, HOST_DEVICE) == OK
    assert len(space.seen) == 1
    assert guest.attach(2, HOST_DEVICE, 1) == OK  # a domain that bypasses
    assert space.seen == ALL
    guest.iommu.reset()
    assert space.seen == ALL
    assert guest.attach(3, HOST_DEVICE) == OK
    guest.iommu.reset()
    assert space.seen == ALL


def test_no_bypass_leaves_a_device_of_the_host_without_memory(guest: Guest, space: FakeSpace) -> None:
    guest.iommu.write_config(BYPASS, b"\0")
    assert space.seen == []
    assert guest.attach(1, HOST_DEVICE) == OK
    guest.iommu.write_config(BYPASS, b"\1")
    assert space.seen == []  # it is in a domain
    assert guest.detach(1, HOST_DEVICE) == OK
    assert space.seen == ALL
    space.locked = False
    guest.iommu.write_config(BYPASS, b"\0")
    guest.iommu.write_config(BYPASS, b"\1")
    assert space.seen == []  # the host refuses: better nothing than half


def test_what_the_host_has_no_room_for_is_not_mapped_at_all(guest: Guest, space: FakeSpace) -> None:
    space.room = 1
    assert guest.attach(1, DISK) == guest.attach(1, HOST_DEVICE) == OK
    assert guest.map(1, 0x10000, 0x1FFFF, 0x40000) == OK
    assert guest.map(1, 0x20000, 0x2FFFF, 0x50000) == NOMEM
    assert len(space.seen) == 1
    endpoint = guest.iommu.core.endpoints[DISK]
    assert isinstance(endpoint.translate(0x20000, READ), int)
    assert guest.attach(2, DISK) == OK
    assert guest.map(2, 0x10000, 0x1FFFF, 0x40000) == guest.map(2, 0x20000, 0x2FFFF, 0x40000) == OK
    assert guest.attach(2, HOST_DEVICE) == NOMEM
    assert guest.iommu.core.endpoints[HOST_DEVICE].domain is None
    assert space.seen == []


def test_only_what_the_host_s_iommu_reaches_can_be_mapped(guest: Guest, space: FakeSpace) -> None:
    assert struct.unpack_from("<Q", guest.iommu.config, 16) == (space.last,)
    assert guest.attach(1, DISK) == OK
    assert guest.map(1, space.last - 0xFFF, space.last, 0) == OK
    assert guest.map(1, space.last + 1, space.last + 0x1000, 0) == RANGE


def test_a_space_that_has_gone_is_left_alone(guest: Guest, space: FakeSpace) -> None:
    guest.iommu.forget_host_device(HOST_DEVICE)
    assert guest.attach(1, HOST_DEVICE) == OK
    assert space.seen == ALL


def test_the_state_of_a_device_of_the_host_is_restored(guest: Guest, space: FakeSpace) -> None:
    guest.attach(1, HOST_DEVICE)
    guest.map(1, 0x10000, 0x1FFFF, 0x40000)
    state = guest.iommu.state()
    guest.iommu.reset()
    guest.iommu.restore(state)
    assert space.seen == [(0x10000, 0x1FFFF, 0x40000, READ | WRITE)]

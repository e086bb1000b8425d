"""Domains and endpoints, without a driver and without a device."""

import errno

import pytest

from pileus.memory._iommu import Endpoint, Iommu

READ, WRITE = 1, 2
NO_DOMAIN, NO_MAPPING = 1, 2
PAGE = 4096


@pytest.fixture
def iommu() -> Iommu:
    return Iommu(bypass=False)


@pytest.fixture
def endpoint(iommu: Iommu) -> Endpoint:
    return iommu.add_endpoint(8, "disk")


def test_an_endpoint_in_no_domain_reaches_nothing_or_everything(iommu: Iommu, endpoint: Endpoint) -> None:
    assert endpoint.translate(PAGE, READ) == NO_DOMAIN
    iommu.bypass = True
    assert endpoint.translate(PAGE, WRITE) == (PAGE, (1 << 64) - PAGE)
    iommu.bypass = False
    assert endpoint.translate(PAGE, READ) == NO_DOMAIN


def test_only_what_is_mapped_for_it_is_reached(iommu: Iommu, endpoint: Endpoint) -> None:
    iommu.attach(endpoint, 5)
    domain = iommu.domains[5]
    assert iommu.map(domain, PAGE, 3 * PAGE - 1, 0x70000, READ) == 0
    assert iommu.map(domain, 2 * PAGE, 2 * PAGE, 0, READ) == -errno.EEXIST
    assert endpoint.translate(PAGE + 1, READ) == (0x70001, 2 * PAGE - 1)
    assert endpoint.translate(PAGE + 1, WRITE) == NO_MAPPING
    assert endpoint.translate(PAGE - 1, READ) == NO_MAPPING
    assert endpoint.translate(3 * PAGE, READ) == NO_MAPPING
    assert iommu.unmap(domain, 0, 2 * PAGE) == -errno.ERANGE
    assert endpoint.translate(PAGE, READ) == (0x70000, 2 * PAGE)
    assert iommu.unmap(domain, 0, 1 << 40) == 1
    assert endpoint.translate(PAGE, READ) == NO_MAPPING


def test_a_domain_is_shared_by_its_endpoints_and_ends_with_the_last(iommu: Iommu, endpoint: Endpoint) -> None:
    other = iommu.add_endpoint(16, "net")
    iommu.attach(endpoint, 1)
    iommu.attach(other, 1)
    iommu.map(iommu.domains[1], 0, PAGE - 1, PAGE, READ | WRITE)
    assert endpoint.translate(0, READ) == other.translate(0, READ) == (PAGE, PAGE)
    iommu.attach(endpoint, 2)
    assert endpoint.translate(0, READ) == NO_MAPPING
    assert sorted(iommu.domains) == [1, 2]
    iommu.detach(other)
    iommu.detach(other)
    assert sorted(iommu.domains) == [2]
    iommu.attach(other, 1)
    assert other.translate(0, READ) == NO_MAPPING, "a new domain of the same number is empty"


def test_a_bypass_domain_uses_guest_physical_addresses(iommu: Iommu, endpoint: Endpoint) -> None:
    iommu.attach(endpoint, 3, bypass=True)
    assert endpoint.translate(0x1234, WRITE) == (0x1234, (1 << 64) - 0x1234)


def test_a_number_belongs_to_one_endpoint(iommu: Iommu, endpoint: Endpoint) -> None:
    with pytest.raises(ValueError, match="endpoint 0x8 is disk"):
        iommu.add_endpoint(8, "net")


def test_mappings_are_limited_over_all_domains() -> None:
    iommu = Iommu(limit=3)
    for number in (1, 2):
        iommu.attach(iommu.add_endpoint(number, "one"), number)
    for index in range(3):
        assert iommu.map(iommu.domains[1 + index % 2], index, index, 0, READ) == 0
    assert iommu.map(iommu.domains[1], 9, 9, 0, READ) == -errno.ENOMEM
    iommu.unmap(iommu.domains[1], 0, 9)
    assert iommu.map(iommu.domains[2], 9, 9, 0, READ) == 0


def test_a_reset_leaves_no_domain(iommu: Iommu, endpoint: Endpoint) -> None:
    iommu.attach(endpoint, 1)
    iommu.reset()
    assert iommu.domains == {}
    assert endpoint.domain is None

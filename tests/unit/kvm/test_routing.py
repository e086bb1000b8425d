"""Messages by GSI, in a real VM: what is routed, and when KVM is told."""

import os
from collections.abc import Iterator

import pytest

from pileus.errors import ConfigError
from pileus.kvm.routing import PINS, Routes

from .conftest import Machine

ADDRESS, DATA = 0xFEE00000, 0x31
OTHER_WAYS = [0, 0xFED00000, 0xFEF00000, 0x1_FEE00000, (1 << 64) - 1]


class Counted:
    """A Vm that counts its routing tables."""

    def __init__(self, machine: Machine) -> None:
        self._vm = machine.vm
        self.add_irqfd = machine.vm.add_irqfd
        self.remove_irqfd = machine.vm.remove_irqfd
        self.tables: list[list[tuple[int, int, int]]] = []

    def set_routing(self, pins: list[tuple[int, int, int]], messages: list[tuple[int, int, int]]) -> None:
        assert pins == PINS
        self._vm.set_routing(pins, messages)
        self.tables.append(messages)


@pytest.fixture
def vm(machine: Machine) -> Counted:
    return Counted(machine)


@pytest.fixture
def routes(vm: Counted) -> Routes:
    return Routes(vm)  # type: ignore[arg-type]


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_gsis_come_after_the_pins_and_are_reused(routes: Routes) -> None:
    assert [routes.allocate(), routes.allocate()] == [24, 25]
    routes.free(24)
    assert [routes.allocate(), routes.allocate()] == [24, 26]


def test_kvm_hears_only_of_changes(routes: Routes, vm: Counted) -> None:
    gsi = routes.allocate()
    routes.set(gsi, ADDRESS, DATA)
    routes.set(gsi, ADDRESS, DATA)
    assert vm.tables == [[(gsi, ADDRESS, DATA)]]
    routes.set(gsi, ADDRESS, DATA + 1)
    assert vm.tables[1:] == [[(gsi, ADDRESS, DATA + 1)]]


def test_a_freed_gsi_takes_its_message_along(routes: Routes, vm: Counted) -> None:
    gsi = routes.allocate()
    routes.set(gsi, ADDRESS, DATA)
    routes.free(gsi)
    assert routes.allocate() == gsi
    routes.set(gsi, 0, 0)
    assert vm.tables == [[(gsi, ADDRESS, DATA)], []]


@pytest.mark.parametrize("address", OTHER_WAYS, ids=hex)
def test_an_address_of_no_interrupt_leads_nowhere(routes: Routes, vm: Counted, address: int, fd: int) -> None:
    gsi = routes.allocate()
    routes.set(gsi, address, DATA)
    routes.attach(fd, gsi)
    os.eventfd_write(fd, 1)
    assert vm.tables == []
    routes.set(gsi, ADDRESS, DATA)
    routes.set(gsi, address, DATA)
    assert vm.tables == [[(gsi, ADDRESS, DATA)], []]
    routes.detach(fd, gsi)


def test_kvm_takes_as_many_messages_as_there_are_gsis(machine: Machine, routes: Routes) -> None:
    """The pins' routes count too."""
    gsis = [routes.allocate() for _ in range(4056)]
    assert gsis == list(range(24, 4080))
    machine.vm.set_routing(PINS, [(gsi, ADDRESS, DATA) for gsi in gsis])
    with pytest.raises(ConfigError, match="KVM routes 4056 interrupts"):
        routes.allocate()


def test_what_was_signalled_while_detached_is_delivered_once_attached(
    machine: Machine, routes: Routes, fd: int
) -> None:
    gsi = routes.allocate()
    os.eventfd_write(fd, 1)
    routes.set(gsi, ADDRESS, DATA)
    routes.attach(fd, gsi)
    routes.detach(fd, gsi)  # waits for what the attaching set off
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)

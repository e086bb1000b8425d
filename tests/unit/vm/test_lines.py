"""Lines to an IOAPIC of our own: what an eventfd of a device comes to, and what its end of interrupt does."""

import os
from collections.abc import Iterator

import pytest

from pileus.arch.x86_64 import layout
from pileus.bus import Bus
from pileus.loop import Loop
from pileus.vm.lines import SplitLines

PIN, OTHER_PIN, VECTOR = 20, 21, 0x51
SELECT, WINDOW = layout.IOAPIC, layout.IOAPIC + 0x10
LEVEL = 1 << 15
MESSAGE = (0xFEE00000, 0xC000 | VECTOR)


class FakeVm:
    def __init__(self) -> None:
        self.irqfds: dict[int, int] = {}

    def add_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
        assert resample_fd is None, "KVM has none without an IOAPIC"
        self.irqfds[fd] = gsi

    def remove_irqfd(self, fd: int, gsi: int) -> None:
        assert self.irqfds.pop(fd) == gsi


class FakeRoutes:
    def __init__(self) -> None:
        self.messages: dict[int, tuple[int, int] | None] = {}
        self.sent: list[tuple[int, int]] = []

    def set_all(self, messages: dict[int, tuple[int, int] | None]) -> None:
        self.messages |= messages

    def signal(self, address: int, data: int) -> bool:
        self.sent.append((address, data))
        return True


class Machine:
    """Lines, and a guest that programs the IOAPIC behind them."""

    def __init__(self) -> None:
        self.vm, self.routes, self.mmio, self.loop = FakeVm(), FakeRoutes(), Bus("mmio"), Loop()
        self.lines = SplitLines(self.vm, self.routes, self.mmio, self.loop)  # type: ignore[arg-type]
        self.fds: list[int] = []

    def program(self, pin: int, entry: int) -> None:
        for half, value in ((1, entry >> 32), (0, entry & 0xFFFFFFFF)):
            self.mmio.store(SELECT, 4, 0x10 + 2 * pin + half)
            self.mmio.store(WINDOW, 4, value)

    def eventfd(self) -> int:
        self.fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.fds[-1]

    def raise_by(self, fd: int) -> None:
        os.eventfd_write(fd, 1)
        self.loop.after(0.01, self.loop.stop)
        self.loop.run()

    def served(self) -> None:
        self.lines.ioapic.end_of_interrupt(VECTOR)

    def close(self) -> None:
        self.loop.close()
        for fd in self.fds:
            os.close(fd)


def was_written(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def test_an_edge_is_kvms(machine: Machine) -> None:
    fd = machine.eventfd()
    machine.lines.add_irqfd(fd, PIN)
    machine.program(PIN, VECTOR)
    assert machine.vm.irqfds == {fd: PIN}
    assert machine.routes.messages[PIN] == (0xFEE00000, VECTOR)
    machine.lines.remove_irqfd(fd, PIN)
    assert machine.vm.irqfds == {}


def test_a_level_goes_on_until_the_guest_has_served_it(machine: Machine) -> None:
    call, resample = machine.eventfd(), machine.eventfd()
    machine.lines.add_irqfd(call, PIN, resample)
    machine.program(PIN, LEVEL | VECTOR)
    machine.raise_by(call)
    assert machine.routes.sent == [MESSAGE]
    assert not was_written(call)
    assert not was_written(resample)
    machine.served()
    assert was_written(resample)
    assert machine.routes.sent == [MESSAGE]
    machine.raise_by(call)
    assert machine.routes.sent == [MESSAGE] * 2


def test_devices_that_share_a_pin_all_hear_of_its_end(machine: Machine) -> None:
    resamples = []
    for pin in (PIN, PIN, OTHER_PIN):
        call, resample = machine.eventfd(), machine.eventfd()
        machine.lines.add_irqfd(call, pin, resample)
        resamples.append(resample)
    machine.program(PIN, LEVEL | VECTOR)
    machine.raise_by(machine.fds[0])
    machine.served()
    assert [was_written(fd) for fd in resamples] == [True, True, False]


def test_a_level_that_is_taken_away_is_not_sent_any_more(machine: Machine) -> None:
    call, resample = machine.eventfd(), machine.eventfd()
    machine.lines.add_irqfd(call, PIN, resample)
    machine.raise_by(call)  # the guest has masked the pin
    machine.lines.remove_irqfd(call, PIN)
    machine.program(PIN, LEVEL | VECTOR)
    assert machine.routes.sent == []
    machine.raise_by(call)
    assert machine.routes.sent == []
    machine.served()
    assert not was_written(resample)


def test_a_pin_that_others_have_is_still_asserted(machine: Machine) -> None:
    pairs = [(machine.eventfd(), machine.eventfd()) for _ in range(2)]
    for call, resample in pairs:
        machine.lines.add_irqfd(call, PIN, resample)
    machine.raise_by(pairs[0][0])
    machine.lines.remove_irqfd(pairs[1][0], PIN)
    machine.program(PIN, LEVEL | VECTOR)
    assert machine.routes.sent == [MESSAGE]

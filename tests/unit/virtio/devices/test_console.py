"""virtio-console, between a driver in memory and a sink or a whole console on a loop."""

import os
from collections.abc import Callable, Iterator
from struct import pack

import pytest

from pileus.console import Console, Sink
from pileus.console._sink import PENDING_MAX, WRITE
from pileus.testing import F_NEXT, FakeDriver, Used
from pileus.virtio import status
from pileus.virtio.devices.console import BACKLOG, BUDGET, EMERG_WR, RECEIVEQ, TRANSMITQ, ConsoleDevice
from pileus.vmm.loop import Loop


class Terminal:
    """A sink on a pipe of one page, whose reader is slow."""

    def __init__(self) -> None:
        self.output, self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.sink = Sink()
        self.sink.attach(self._pipe, WRITE)

    def read(self, size: int = 1 << 20) -> bytes:
        try:
            return os.read(self.output, size)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.sink.close()
        os.close(self.output)
        os.close(self._pipe)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.fixture
def console(terminal: Terminal) -> ConsoleDevice:
    return ConsoleDevice("console0", terminal.sink)


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def driver(console: ConsoleDevice, request: pytest.FixtureRequest) -> Iterator[FakeDriver]:
    with FakeDriver(console, event_idx=request.param) as driver:
        yield driver


# -- output ---------------------------------------------------------------------------------------


def test_output_goes_to_the_sink_in_order(driver: FakeDriver, terminal: Terminal) -> None:
    first = driver.add([b"Hello, ", b"world"], queue=TRANSMITQ)
    second = driver.add([b"!\n"], queue=TRANSMITQ)
    driver.kick(TRANSMITQ)
    assert terminal.read() == b"Hello, world!\n"
    assert driver.used(TRANSMITQ) == [Used(first, 0), Used(second, 0)]
    assert driver.calls(TRANSMITQ) == 1


def test_output_waits_in_the_ring_while_the_sink_is_full(
    driver: FakeDriver, console: ConsoleDevice, terminal: Terminal
) -> None:
    data = os.urandom(300_000)
    for start in range(0, len(data), 50_000):
        driver.add([data[start : start + 50_000]], queue=TRANSMITQ)
    driver.kick(TRANSMITQ)
    assert terminal.sink.pending == PENDING_MAX
    done = len(driver.used(TRANSMITQ))
    assert done < 6
    driver.kick(TRANSMITQ)  # a driver that kicks all the same changes nothing
    assert driver.used(TRANSMITQ) == []
    got = b""
    while piece := terminal.read():
        got += piece
        terminal.sink.drain()
        console.output_ready()
    assert got == data
    assert done + len(driver.used(TRANSMITQ)) == 6
    assert driver.rings[TRANSMITQ].in_flight == 0


def test_after_a_reset_output_begins_with_the_next_chain(
    driver: FakeDriver, console: ConsoleDevice, terminal: Terminal
) -> None:
    driver.add([bytes(PENDING_MAX + 100_000)], queue=TRANSMITQ)
    driver.kick(TRANSMITQ)
    assert driver.used(TRANSMITQ) == []
    driver.start()
    while terminal.read():
        terminal.sink.drain()
    driver.add([b"new"], queue=TRANSMITQ)
    driver.kick(TRANSMITQ)
    console.output_ready()
    assert terminal.read() == b"new"


def test_a_chain_of_gigabytes_is_output_a_piece_at_a_time() -> None:
    """One that names the same page again and again: others on the loop have their turn meanwhile."""
    sink = Sink()  # attached to nothing: it drops all, and counts
    device = ConsoleDevice("console0", sink)
    with FakeDriver(device) as driver:
        for index in range(4):
            driver.write_descriptor(index, 0, 8 << 20, F_NEXT if index < 3 else 0, index + 1, TRANSMITQ)
        driver.offer(0, TRANSMITQ)
        os.eventfd_write(device.queues[TRANSMITQ].kick_fd, 1)
        turns = 0
        while os.eventfd_read(device.queues[TRANSMITQ].kick_fd):
            device.kicked(TRANSMITQ)
            turns += 1
            assert sink.dropped == turns * BUDGET
            if sink.dropped == 32 << 20:
                break
        driver.serve()
        assert driver.used(TRANSMITQ) == [Used(0, 0)]
    sink.close()


def test_an_emergency_character_needs_no_driver(console: ConsoleDevice, terminal: Terminal) -> None:
    with FakeDriver(console, start=False) as driver:
        driver.write_config(EMERG_WR, pack("<I", ord("!")))
        driver.write_config(0, b"ignored")
        assert terminal.read() == b"!"


# -- input ----------------------------------------------------------------------------------------


def test_input_fills_buffers(driver: FakeDriver, console: ConsoleDevice) -> None:
    first = driver.add(writable=[4], queue=RECEIVEQ)
    second = driver.add(writable=[2, 10], queue=RECEIVEQ)
    driver.kick(RECEIVEQ)
    assert console.feed(b"some words") == 10
    assert driver.used(RECEIVEQ) == [Used(first, 4), Used(second, 6)]
    assert driver.read(first, RECEIVEQ) == b"some"
    assert driver.read(second, RECEIVEQ)[:6] == b" words"
    assert driver.calls(RECEIVEQ) == 1


def test_input_waits_for_buffers(driver: FakeDriver, console: ConsoleDevice) -> None:
    assert console.feed(b"early") == 5
    head = driver.add(writable=[64], queue=RECEIVEQ)
    assert driver.kick_if_wanted(RECEIVEQ), "a device with input waiting wants to know"
    assert driver.used(RECEIVEQ) == [Used(head, 5)]
    assert driver.read(head, RECEIVEQ)[:5] == b"early"


def test_input_waits_for_a_driver(console: ConsoleDevice) -> None:
    with FakeDriver(console, start=False) as driver:
        assert console.feed(b"boot: ") == 6
        driver.negotiate()
        driver.set_up_queues()
        head = driver.add(writable=[16], queue=RECEIVEQ)
        driver.control.set_status(driver.status | status.DRIVER_OK)
        driver.serve()
        assert driver.used(RECEIVEQ) == [Used(head, 6)]


def test_input_beyond_the_backlog_is_left_to_who_feeds(driver: FakeDriver, console: ConsoleDevice) -> None:
    assert console.feed(bytes(BACKLOG + 1)) == BACKLOG
    assert console.feed(b"x") == 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(console.room_fd)
    driver.add(writable=[BACKLOG // 2 - 1], queue=RECEIVEQ)
    driver.kick(RECEIVEQ)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(console.room_fd)
    driver.add(writable=[1], queue=RECEIVEQ)
    driver.kick(RECEIVEQ)
    assert os.eventfd_read(console.room_fd) == 1
    assert console.feed(b"x") == 1


WRONG: dict[str, Callable[[FakeDriver], object]] = {
    "input into nothing": lambda driver: driver.add([b"x"], queue=RECEIVEQ),
    "input into a mixture": lambda driver: driver.add([b"x"], [1], queue=RECEIVEQ),
    "output from a mixture": lambda driver: driver.add([b"x"], [1], queue=TRANSMITQ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_buffer_of_the_wrong_kind_stops_the_device(
    driver: FakeDriver, console: ConsoleDevice, name: str
) -> None:
    WRONG[name](driver)
    console.feed(b"input")
    driver.kick(RECEIVEQ)
    driver.kick(TRANSMITQ)
    assert driver.status & status.NEEDS_RESET
    assert console.feed(b"more") == 4  # the host's side goes on
    console.output_ready()


# -- size -----------------------------------------------------------------------------------------


def test_a_new_size_is_told(driver: FakeDriver, console: ConsoleDevice) -> None:
    assert driver.read_config() == pack("<HHII", 0, 0, 1, 0)
    console.resize(132, 43)
    assert driver.read_config() == pack("<HHII", 132, 43, 1, 0)
    assert driver.config_interrupts == 1
    console.resize(132, 43)
    assert driver.config_interrupts == 1
    console.resize(1 << 20, 1)
    assert driver.read_config(0, 2) == b"\xff\xff"


# -- with a console and a loop ---------------------------------------------------------------------


class PipeConsole(Console):
    """A console on two pipes."""

    columns = 80

    def __init__(self) -> None:
        super().__init__("console")
        self._input, self.keyboard = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.screen, self._output = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.sink.attach(self._output, WRITE)

    @property
    def size(self) -> tuple[int, int]:
        return self.columns, 25


def turn(loop: Loop) -> None:
    for _ in range(4):
        loop.after(0, loop.stop)
        loop.run()


def test_a_console_serves_the_device_through_reboots() -> None:
    loop, far_end = Loop(), PipeConsole()
    far_end.start(loop)
    for _ in range(2):
        device = ConsoleDevice("console0", far_end.sink)
        with FakeDriver(device) as driver:
            far_end.connect(device)
            assert driver.read_config(0, 4) == pack("<HH", 80, 25)
            os.write(far_end.keyboard, b"k" * 10_000)
            turn(loop)
            got = 0
            while got < 10_000:
                driver.add(writable=[1000], queue=RECEIVEQ)
                driver.kick(RECEIVEQ)
                turn(loop)
                got += sum(used.length for used in driver.used(RECEIVEQ))
            driver.add([b"s" * 200_000], queue=TRANSMITQ)
            driver.kick(TRANSMITQ)
            seen = 0
            while seen < 200_000:
                seen += len(os.read(far_end.screen, 1 << 20))
                turn(loop)
            assert len(driver.used(TRANSMITQ)) == 1
            far_end.columns = 132
            far_end.resized()
            assert driver.read_config(0, 2) == pack("<H", 132)
            far_end.columns = 80
            far_end.disconnect()
        far_end.restart()
    os.close(far_end.keyboard)
    os.close(far_end.screen)
    far_end.close()
    loop.close()

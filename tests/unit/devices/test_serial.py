"""The UART, driven as Linux and the BSDs drive it."""

import os

import pytest

from .conftest import BASE, Guest

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR
SINK_MAX = 64 * 1024


def fill_host(guest: Guest) -> int:
    """Send until the port makes its guest wait; return how many bytes that took."""
    sent = 0
    while guest.inb(LSR) & 0x20:
        guest.outb(DATA, sent & 0xFF)
        sent += 1
    return sent


def test_starts_as_an_idle_port(guest: Guest) -> None:
    assert [guest.inb(register) for register in range(8)] == [0, 0, 0x01, 3, 8, 0x60, 0xB0, 0]


def test_linux_takes_it_for_a_16550a(guest: Guest) -> None:
    """Source: Linux 6.12, drivers/tty/serial/8250/8250_port.c, autoconfig() and autoconfig_16550a()."""
    guest.outb(IER, 0)
    assert guest.inb(IER) == 0
    guest.outb(IER, 0xFF)
    assert guest.inb(IER) == 0x0F  # no bits of later chips
    guest.outb(IER, 0)
    guest.outb(MCR, 0x10 | 0x08 | 0x02)
    assert guest.inb(MSR) & 0xF0 == 0x90  # looped
    guest.outb(MCR, 0)
    guest.outb(LCR, 0xBF)
    guest.outb(FCR, 0)
    guest.outb(LCR, 0)
    guest.outb(FCR, 1)
    assert guest.inb(IIR) >> 6 == 3  # a 16550A
    guest.outb(FCR, 0x21)
    assert guest.inb(IIR) >> 5 == 6  # no 64-byte FIFO
    guest.outb(LCR, 0x80)
    assert guest.inb(IIR) != 0  # no EFR


def test_the_transmitter_interrupt_returns_each_time_it_is_enabled(guest: Guest) -> None:
    """Else Linux sets up a timer for a broken port. Source: serial8250_do_startup()."""
    for _ in range(2):
        guest.outb(IER, 2)
        assert guest.edges() == 1
        assert guest.inb(IIR) == 0x02
        assert guest.inb(IIR) == 0x01
        guest.outb(IER, 0)


def test_sixteen_bytes_go_out_for_each_interrupt(guest: Guest) -> None:
    guest.outb(FCR, 0x07)
    guest.outb(IER, 2)
    for start in range(0, 64, 16):
        assert guest.edges() == 1
        assert guest.inb(IIR) == 0xC2
        assert guest.inb(LSR) & 0x60 == 0x60
        for byte in range(start, start + 16):
            guest.outb(DATA, byte)
    assert guest.read_output() == bytes(range(64))


def test_output_waits_while_the_host_does_not_read(guest: Guest) -> None:
    guest.outb(FCR, 1)
    guest.outb(IER, 2)
    sent = fill_host(guest)
    assert guest.sink.pending == SINK_MAX
    guest.edges()
    assert guest.inb(IIR) == 0xC1
    guest.outb(DATA, sent & 0xFF)  # Linux's polling console writes after 10 ms all the same
    got = guest.read_output()
    guest.sink.drain()
    guest.serial.output_ready()
    assert guest.edges() == 1
    assert guest.inb(IIR) == 0xC2
    assert guest.inb(LSR) == 0x60
    while chunk := guest.read_output():
        got += chunk
        guest.sink.drain()
    assert got == bytes(index & 0xFF for index in range(sent + 1))


def test_bytes_beyond_a_full_fifo_are_lost(guest: Guest) -> None:
    guest.outb(FCR, 1)
    fill_host(guest)
    for _ in range(40):
        guest.outb(DATA, 0xEE)
    state = guest.serial.state()["sending"]
    assert isinstance(state, bytes)
    assert len(state) == 16


def test_input_interrupts_and_is_read_in_order(guest: Guest) -> None:
    guest.outb(FCR, 0x81)  # trigger at 8 bytes
    guest.outb(IER, 1)
    assert guest.serial.feed(b"root\n") == 5
    assert guest.edges() == 1
    assert guest.inb(IIR) == 0xCC  # below the trigger level: a time-out
    guest.serial.feed(b"exit\n")
    assert guest.edges() == 0  # the line is high already
    assert guest.inb(IIR) == 0xC4
    read = bytearray()
    while guest.inb(LSR) & 1:
        read.append(guest.inb(DATA))
    assert read == b"root\nexit\n"
    assert guest.inb(IIR) == 0xC1
    assert guest.inb(DATA) == 0


def test_another_reason_raises_another_edge(guest: Guest) -> None:
    guest.outb(FCR, 1)
    guest.outb(IER, 3)
    guest.edges()
    guest.serial.feed(b"a")
    assert guest.edges() == 1
    assert guest.inb(IIR) == 0xC4
    guest.inb(DATA)
    assert guest.edges() == 1  # the transmitter is still waiting
    assert guest.inb(IIR) == 0xC2


def test_input_that_finds_no_room_is_asked_for_again(guest: Guest) -> None:
    assert guest.serial.feed(b"x" * 5000) == 4096
    assert guest.serial.feed(b"x") == 0
    for _ in range(2047):
        guest.inb(DATA)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(guest.serial.room_fd)
    guest.inb(DATA)
    assert os.eventfd_read(guest.serial.room_fd) == 1
    assert guest.serial.feed(b"x" * 5000) == 2048


def test_a_fifo_reset_loses_no_input(guest: Guest) -> None:
    guest.serial.feed(b"early")
    for control in (1, 7, 0, 1):
        guest.outb(FCR, control)
    assert bytes(guest.inb(DATA) for _ in range(5)) == b"early"


def test_loopback_receives_what_it_sends_and_cuts_the_wire(guest: Guest) -> None:
    guest.outb(MCR, 0x10)
    guest.outb(FCR, 1)
    guest.serial.feed(b"host")
    assert guest.inb(LSR) == 0x60
    for byte in range(17):  # FreeBSD counts up to the overrun to size the FIFO
        assert not guest.inb(LSR) & 2
        guest.outb(DATA, byte)
    assert guest.inb(LSR) == 0x63
    assert guest.inb(LSR) == 0x61  # reading it cleared the overrun
    assert [guest.inb(DATA) for _ in range(16)] == list(range(16))
    assert guest.inb(LSR) == 0x60
    assert guest.read_output() == b""
    guest.outb(MCR, 0)
    assert guest.inb(DATA) == ord("h")


def test_an_overrun_is_the_most_urgent_reason(guest: Guest) -> None:
    guest.outb(MCR, 0x10)
    guest.outb(IER, 0x0F)
    guest.outb(DATA, 1)
    guest.outb(DATA, 2)
    seen = []
    for register in (LSR, DATA, IIR, MSR, IIR):
        seen.append(guest.inb(IIR))
        guest.inb(register)
    assert seen == [0x06, 0x04, 0x02, 0x00, 0x01]


def test_modem_lines_tell_of_their_changes_once(guest: Guest) -> None:
    guest.outb(MCR, 0x10)
    assert guest.inb(MSR) == 0x0B
    guest.outb(MCR, 0x14)
    assert guest.inb(MSR) == 0x40
    guest.outb(MCR, 0x10)
    assert guest.inb(MSR) == 0x04
    assert guest.inb(MSR) == 0x00


def test_the_divisor_hides_behind_dlab(guest: Guest) -> None:
    guest.outb(LCR, 0x83)
    assert [guest.inb(DATA), guest.inb(IER)] == [12, 0]
    guest.outb(DATA, 0x34)
    guest.outb(IER, 0x12)
    assert [guest.inb(DATA), guest.inb(IER)] == [0x34, 0x12]
    guest.outb(LCR, 0x03)
    assert [guest.inb(DATA), guest.inb(IER)] == [0, 0]
    assert guest.read_output() == b""


@pytest.mark.parametrize("size", [2, 4, 8])
def test_only_bytes_are_answered(guest: Guest, size: int) -> None:
    guest.bus.store(BASE, size, 0x4141414141414141 & (1 << 8 * size) - 1)
    assert guest.bus.load(BASE, size) == (1 << 8 * size) - 1
    assert guest.read_output() == b""


def test_a_restored_port_goes_on(guest: Guest) -> None:
    guest.outb(FCR, 0xC1)
    guest.outb(SCR, 0x5A)
    fill_host(guest)
    guest.serial.feed(b"typed")
    state = guest.serial.state()
    other = Guest()
    other.serial.restore(state)
    assert other.serial.state() == state
    other.outb(IER, 3)
    other.edges()
    other.serial.output_ready()
    assert other.read_output() == state["sending"]
    assert [other.inb(DATA) for _ in range(5)] == list(b"typed")
    assert other.inb(SCR) == 0x5A
    other.close()


def test_an_interrupt_that_is_due_after_restore_is_raised(guest: Guest) -> None:
    guest.outb(IER, 1)
    guest.serial.feed(b"x")
    state = guest.serial.state()
    guest.edges()
    guest.serial.restore(state)
    guest.serial.output_ready()  # as Console.connect does
    assert guest.edges() == 1


@pytest.mark.parametrize("key", ["wire", "looped", "sending"])
def test_a_state_that_does_not_fit_is_refused(guest: Guest, key: str) -> None:
    state = guest.serial.state()
    with pytest.raises(ValueError, match="more than fit"):
        guest.serial.restore(state | {key: bytes(5000)})
    assert guest.serial.state() == state

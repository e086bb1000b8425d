"""What all consoles share, and the null and file consoles."""

import os
from pathlib import Path

import pytest

from pileus.bus import Bus
from pileus.console import Console, open_console
from pileus.console._sink import PENDING_MAX
from pileus.devices.serial import Serial
from pileus.errors import HostError

from .conftest import Bench

PIPE_MAX = 64 * 1024


class PipeConsole(Console):
    """Reads one pipe and writes another: a console reduced to what the base does."""

    def __init__(self, bench: Bench) -> None:
        super().__init__("pipes", bench.warnings.append)
        self._input, self.stdin = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.stdout, self._output = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.sink.attach(self._output, 0)

    def close(self) -> None:
        super().close()
        for fd in (self.stdin, self.stdout):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = -1


def test_the_null_console_takes_all_and_gives_nothing(bench: Bench) -> None:
    with open_console("null") as console:
        bench.serve(console)
        assert console.sink.write(b"hello") == 5
        bench.settle()
        assert bench.port.got == b""


def test_an_unknown_mode_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no console mode"):
        open_console("tcp")


def test_input_reaches_the_port(bench: Bench) -> None:
    with PipeConsole(bench) as console:
        bench.serve(console)
        os.write(console.stdin, b"ls\r")
        bench.turn()
        assert bench.port.got == b"ls\r"


def test_a_guest_that_does_not_read_stops_the_host_from_reading(bench: Bench) -> None:
    data = bytes(range(256)) * 100
    bench.port.room = 10
    with PipeConsole(bench) as console:
        bench.serve(console)
        os.write(console.stdin, data)
        bench.settle()
        assert bench.port.got == data[:10]
        assert os.read(console._input, 1 << 20) == data[4096:]
        bench.port.make_room(5)
        bench.settle()
        assert bench.port.got == data[:15]
        bench.port.make_room(1 << 20)
        bench.settle()
        assert bench.port.got == data[:4096]


def test_the_end_of_input_is_not_the_end_of_output(bench: Bench) -> None:
    with PipeConsole(bench) as console:
        bench.serve(console)
        os.close(console.stdin)
        console.stdin = -1
        bench.settle()
        console.sink.write(b"still here")
        assert os.read(console.stdout, 100) == b"still here"


def test_a_slow_reader_holds_the_guest_and_lets_it_go_on(bench: Bench) -> None:
    with PipeConsole(bench) as console:
        bench.serve(console)
        assert console.sink.write(bytes(PIPE_MAX + PENDING_MAX + 1)) == PIPE_MAX + PENDING_MAX
        bench.settle()
        chances = bench.port.chances
        os.read(console.stdout, 8192)
        bench.settle()
        assert bench.port.chances > chances
        assert console.sink.write(b"x") == 1
        while console.sink.pending:
            os.read(console.stdout, 1 << 20)
            bench.settle()


def test_a_reader_that_goes_away_is_warned_about_once(bench: Bench) -> None:
    with PipeConsole(bench) as console:
        bench.serve(console)
        os.close(console.stdout)
        console.stdout = -1
        for _ in range(3):
            console.sink.write(b"x")
            bench.settle()
        assert bench.warnings == ["pipes: output is being lost: Broken pipe"]


def test_close_waits_for_a_slow_reader_but_not_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pileus.console.console.LAST_PATIENCE", 0.01)
    console = PipeConsole(bench)
    console.sink.write(bytes(PIPE_MAX + 10))
    reader = os.dup(console.stdout)
    console.close()
    console.close()
    assert len(os.read(reader, 1 << 20)) == PIPE_MAX
    os.close(reader)


def test_input_waits_for_the_next_device(bench: Bench) -> None:
    with PipeConsole(bench) as console:
        bench.serve(console)
        console.disconnect()
        os.write(console.stdin, b"typed while the guest reboots")
        bench.settle()
        assert bench.port.got == b""
        console.connect(bench.port)
        assert bench.port.got == b"typed while the guest reboots"


def test_a_serial_port_and_a_console_work_together(bench: Bench) -> None:
    with PipeConsole(bench) as console:
        serial, bus = Serial(console.sink), Bus("ports")
        bus.insert(0, 8, serial)
        console.start(bench.loop)
        console.connect(serial)
        data = bytes(range(256)) * 40
        os.write(console.stdin, data)
        got = bytearray()
        while len(got) < len(data):
            bench.settle()
            while bus.load(5, 1) & 1:
                got.append(bus.load(0, 1))
        assert got == data
        sent = 0
        while bus.load(5, 1) & 0x20:
            bus.store(0, 1, 0x55)
            sent += 1
        bench.settle()
        assert not bus.load(5, 1) & 0x20
        assert len(os.read(console.stdout, 1 << 20)) == PIPE_MAX
        bench.settle()
        assert bus.load(5, 1) & 0x20
        console.stop()
        serial.close()


def test_a_file_is_created_and_truncated_at_each_boot(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text("from long ago")
    with open_console("file", str(path)) as console:
        bench.serve(console)
        console.sink.write(b"first boot, which says more\r\n")
        assert path.read_bytes() == b"first boot, which says more\r\n"
        console.restart()
        console.sink.write(b"second boot\r\n")
        assert path.read_bytes() == b"second boot\r\n"
        bench.settle()


def test_a_file_that_was_moved_away_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    path, old = tmp_path / "console.log", tmp_path / "console.log.1"
    with open_console("file", str(path)) as console:
        console.sink.write(b"first")
        path.rename(old)
        console.restart()
        console.sink.write(b"second")
    assert (old.read_bytes(), path.read_bytes()) == (b"first", b"second")


def test_a_truncated_file_gets_no_hole(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with open_console("file", str(path)) as console:
        console.sink.write(b"x" * 1000)
        os.truncate(path, 0)
        console.sink.write(b"after")
    assert path.read_bytes() == b"after"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=f"cannot write the output of serial to {tmp_path}: Is a directory"):
        open_console("file", str(tmp_path), name="serial")


def test_the_port_hears_of_the_size_when_it_is_connected_and_when_it_changes(bench: Bench) -> None:
    class Sized(Console):
        size = (80, 25)

    with Sized() as console:
        bench.serve(console)
        assert bench.port.sizes == [(80, 25)]
        console.resized()
        assert bench.port.sizes == [(80, 25)] * 2
        console.disconnect()
        console.resized()
        assert bench.port.sizes == [(80, 25)] * 2

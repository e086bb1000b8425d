"""virtio-rng, through a driver in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus import log
from pileus.errors import HostError
from pileus.testing import F_NEXT, F_WRITE, FakeDriver, Used
from pileus.virtio import status
from pileus.virtio.devices.rng import BUDGET, MAX_REQUEST, REQUESTQ, FileSource, Rng

BAD_DESCRIPTORS: dict[str, dict[str, int]] = {
    "loops to itself": {"flags": F_NEXT, "next": 0},
    "next outside the table": {"flags": F_NEXT, "next": 999},
    "buffer past the end of ram": {"flags": F_WRITE, "gpa": FakeDriver.RAM_SIZE, "length": 1},
    "for the device to read": {"gpa": 0, "length": 8},
    "empty": {"flags": F_WRITE},
}


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with FakeDriver(Rng("rng0", source=lambda count: b"\xa5" * count)) as driver:
        yield driver


def test_fills_every_buffer_of_a_request(driver: FakeDriver) -> None:
    head = driver.add(writable=[3, 5])
    driver.kick(REQUESTQ)
    assert driver.used() == [Used(head, length=8)]
    assert driver.read(head) == b"\xa5" * 8
    assert driver.interrupts == 1


def test_while_paused_kicks_wait(driver: FakeDriver) -> None:
    driver.device.pause()
    head = driver.add(writable=[8])
    driver.kick(REQUESTQ)
    driver.kick(REQUESTQ)
    assert driver.used() == []
    assert driver.read(head) == bytes(8)
    driver.device.resume()
    assert driver.used() == [Used(head, length=8)]
    assert driver.interrupts == 1


def test_a_device_that_was_reset_while_paused_serves_no_old_kick(driver: FakeDriver) -> None:
    driver.device.pause()
    driver.add(writable=[8])
    driver.kick(REQUESTQ)
    driver.reset()
    driver.device.resume()
    assert driver.interrupts == 0


def test_a_huge_request_gets_a_part(driver: FakeDriver) -> None:
    head = driver.add(writable=[MAX_REQUEST, 5])
    driver.kick(REQUESTQ)
    assert driver.used() == [Used(head, length=MAX_REQUEST)]


@pytest.mark.parametrize("bad", BAD_DESCRIPTORS.values(), ids=list(BAD_DESCRIPTORS))
def test_a_bad_descriptor_stops_the_device(driver: FakeDriver, bad: dict[str, int]) -> None:
    driver.write_descriptor(0, **bad)
    driver.offer(0)
    driver.kick(REQUESTQ)
    assert driver.used() == []
    assert driver.status & status.NEEDS_RESET


def test_a_ring_of_huge_requests_is_served_by_and_by(driver: FakeDriver) -> None:
    for index in range(32):
        driver.write_descriptor(index, 0x100000, MAX_REQUEST, F_WRITE)
        driver.offer(index)
    queue = driver.device.queues[REQUESTQ]
    driver.device.kicked(REQUESTQ)
    assert len(driver.used()) == BUDGET // MAX_REQUEST
    assert os.eventfd_read(queue.kick_fd) == 1
    driver.device.kicked(REQUESTQ)
    assert len(driver.used()) == 32 - BUDGET // MAX_REQUEST


# -- FileSource -----------------------------------------------------------------------------------


def test_a_file_that_ends_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "entropy"
    path.write_bytes(b"abc")
    source = FileSource(str(path))
    assert [source(2), source(2), source(2)] == [b"ab", b"c", b"ab"]
    source.close()
    source.close()


@pytest.mark.parametrize("path", ["/dev/urandom", "/dev/random"])
def test_the_kernels_devices_give_what_is_asked(path: str) -> None:
    source = FileSource(path)
    assert 1 <= len(source(64)) <= 64
    source.close()


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    before = os.listdir("/proc/self/fd")
    for path, reason in [(tmp_path, "directory"), (empty, "empty"), (tmp_path / "none", "No such file")]:
        with pytest.raises(HostError, match=f"cannot read entropy from .*{reason}"):
            FileSource(str(path))
    assert os.listdir("/proc/self/fd") == before


def test_a_source_with_nothing_to_give_is_helped_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    shrinking = tmp_path / "file"
    shrinking.write_bytes(b"x")
    log.level = log.WARNING
    try:
        sources = [FileSource(str(fifo)), FileSource(str(shrinking))]
        shrinking.write_bytes(b"")
        for source in sources:
            assert len(source(32)) == 32
            source.close()
    finally:
        log.level = log.ERROR
    said = capfd.readouterr().err
    assert f"no entropy from {fifo}" in said
    assert f"no entropy from {shrinking}, it has come to its end" in said


def test_a_pipe_gives_what_is_in_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    source = FileSource(str(fifo))
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, b"short")
    assert source(64) == b"short"
    assert len(source(64)) == 64  # and never waits for more
    os.close(writer)
    source.close()

"""The commands pileus-blk and pileus-net."""

import os
import random
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pileus.loop import Loop
from pileus.vhost_user.connection import Client, Server
from pileus.vhost_user.devices.blk import VhostUserBlk
from pileus.virtio import status
from tests.listening import PATIENCE
from tests.unit.net.namespace import skip_unless_possible
from tests.unit.virtio.devices.disks import OK, SECTOR, Disk

from .commands import Process, command, environment
from .test_backend import blk, driving
from .writer import BLOCK, BLOCKS, Writer

QUEUES = 2
CAP_WORDS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(QUEUES * BLOCKS * BLOCK)
    return path


def options(image: Path, **more: object) -> list[str]:
    keys = {"path": image, "image_type": "raw", "num_queues": QUEUES, **more}
    return ["--backend", ",".join(f"{key}={value}" for key, value in keys.items())]


# -- wrong options --------------------------------------------------------------------------------

WRONG = {
    "no options": ("pileus-blk", [], "--backend is missing: path= of an image is needed"),
    "no socket": ("pileus-blk", ["--backend", "path=/x"], "--socket is missing: front-ends need a socket"),
    "two sockets": ("pileus-net", ["--socket", "/a", "--fd", "3"], "--fd 3: one of --socket, --fd and sock"),
    "no image": (
        "pileus-blk",
        ["--backend", "path=/nope", "--socket", "/a"],
        "cannot open /nope: No such file",
    ),
    "neither path nor fd": (
        "pileus-blk",
        ["--backend", "readonly=on", "--socket", "/a"],
        "path= is required",
    ),
    "odd queues": ("pileus-net", ["--backend", "num_queues=3", "--socket", "/a"], "an even number"),
    "odd size": ("pileus-net", ["--backend", "queue_size=3", "--socket", "/a"], "a power of two"),
    "no such key": ("pileus-net", ["--net-backend", "path=/x", "--socket", "/a"], "there is no key path"),
    "no such option": ("pileus-blk", ["--sockets", "/a"], "did you mean --socket?"),
    "no descriptor": ("pileus-blk", ["--backend", "fd=77", "--socket", "/a"], "cannot open fd 77: Bad file"),
    "no inherited socket": ("pileus-blk", ["--backend", "path=/dev/zero", "--fd", "77"], "cannot"),
    "a long path": ("pileus-net", ["--socket", "/" + 200 * "a"], "at most 107 bytes"),
    "a client of nothing": ("pileus-net", ["--fd", "3", "--client"], "--client with --fd"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_one_sentence_and_status_1(case: tuple[str, list[str], str]) -> None:
    name, words, expected = case
    result = subprocess.run(
        command(name, *words),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"{name}: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["pileus-blk", "pileus-net"])
def test_help_names_every_option(name: str) -> None:
    text = subprocess.run(
        command(name, "--help"), env=environment(), capture_output=True, text=True, check=True
    ).stdout
    for word in ("--backend", "--socket", "--fd", "--client", "sock=", "num_queues=", "queue_size="):
        assert word in text


def test_pileus_net_without_a_tap_s_descriptor_says_so(tmp_path: Path) -> None:
    words = command("pileus-net", "--backend", "fd=[77]", "--socket", str(tmp_path / "s"))
    result = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "fd 77: it is not open" in result.stderr


# -- life -----------------------------------------------------------------------------------------


def test_it_gives_up_its_privileges_and_removes_its_socket(tmp_path: Path, image: Path) -> None:
    with Process("pileus-blk", options(image), tmp_path / "s") as backend:
        with driving(blk(str(backend.socket))) as driver:
            assert Disk(driver).write(0, b"x" * SECTOR) == OK
        text = Path(f"/proc/{backend.process.pid}/status").read_text()
        told = dict(line.split(":\t", 1) for line in text.splitlines())
        assert [int(told[word], 16) for word in CAP_WORDS] == [0] * 5
        assert told["NoNewPrivs"] == "1"
        assert backend.end() == 0
        assert not backend.socket.exists()


def test_a_socket_left_by_a_dead_one_is_no_hindrance_and_one_in_use_is(tmp_path: Path, image: Path) -> None:
    with Process("pileus-blk", options(image), tmp_path / "s") as backend:
        backend.kill()
        assert backend.socket.exists()
        process = subprocess.Popen(backend.words, env=environment())
        with driving(blk(str(backend.socket))) as driver:
            assert Disk(driver).read(0, SECTOR) == bytes(SECTOR)
        other = subprocess.run(
            command("pileus-net", "--socket", str(backend.socket), "--backend", "fd=[77]"),
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert other.returncode == 1
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("listens", [True, False], ids=["one that listens", "a connection"])
def test_it_takes_an_inherited_socket(tmp_path: Path, image: Path, listens: bool) -> None:
    path = str(tmp_path / "s")
    ours, theirs = socket.socketpair()
    if listens:
        theirs.close()
        theirs = socket.socket(socket.AF_UNIX)
        theirs.bind(path)
        theirs.listen()
    words = command("pileus-blk", *options(image), "--fd", str(theirs.fileno()))
    process = subprocess.Popen(words, env=environment(), pass_fds=[theirs.fileno()])
    theirs.close()
    if listens:
        for _ in range(2):
            with driving(blk(path)) as driver:
                assert Disk(driver).read(0, SECTOR) == bytes(SECTOR)
        process.terminate()
    ours.close()
    assert process.wait(PATIENCE) == 0


def listening(path: str) -> Callable[[Loop], VhostUserBlk]:
    """A disk whose front-end waits for its back-end."""
    return lambda loop: VhostUserBlk("b", "--disk", Server(path), loop, patience=PATIENCE)


def test_it_connects_to_a_front_end_that_listens(tmp_path: Path, image: Path) -> None:
    path = str(tmp_path / "s")
    words = command("pileus-blk", *options(image), "--socket", path, "--client")
    process = subprocess.Popen(words, env=environment())
    time.sleep(0.2)
    for _ in range(2):
        with driving(listening(path)) as driver:
            assert Disk(driver).read(0, SECTOR) == bytes(SECTOR)
    process.terminate()
    assert process.wait(PATIENCE) == 0


def test_a_disk_by_its_descriptor(tmp_path: Path, image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    path = tmp_path / "s"
    words = command("pileus-blk", "--backend", f"fd={fd},image_type=raw", "--socket", str(path))
    process = subprocess.Popen(words, env=environment(), pass_fds=[fd])
    os.close(fd)
    with driving(blk(str(path))) as driver:
        assert Disk(driver).write(7, b"d" * SECTOR) == OK
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert image.read_bytes()[7 * SECTOR :][:SECTOR] == b"d" * SECTOR


def test_a_read_only_disk_refuses_writes(tmp_path: Path, image: Path) -> None:
    with (
        Process("pileus-blk", options(image, readonly="on", wce="off"), tmp_path / "s") as backend,
        driving(blk(str(backend.socket))) as driver,
    ):
        assert driver.offered & (1 << 5 | 1 << 11) == 1 << 5
        assert Disk(driver).write(0, b"x" * SECTOR) != OK


# -- death ----------------------------------------------------------------------------------------


def test_killing_it_ten_times_in_the_middle_of_writes_loses_nothing(tmp_path: Path, image: Path) -> None:
    chance = random.Random(5)
    with Process("pileus-blk", options(image), tmp_path / "s") as backend:
        client = Client(str(backend.socket))
        with driving(lambda loop: VhostUserBlk("b", "--disk", client, loop, num_queues=QUEUES)) as driver:
            writer = Writer(driver, QUEUES)
            writer.start()
            for _ in range(10):
                time.sleep(chance.uniform(0.05, 0.3))
                backend.kill()
                backend.start()
            writer.finish()
            assert driver.status & status.NEEDS_RESET == 0


def test_a_driver_that_resets_while_it_is_dead_finds_it_again(tmp_path: Path, image: Path) -> None:
    with (
        Process("pileus-blk", options(image), tmp_path / "s") as backend,
        driving(blk(str(backend.socket))) as driver,
    ):
        assert Disk(driver).write(1, b"x" * SECTOR) == OK
        backend.kill()
        driver.start()
        backend.start()
        assert Disk(driver).read(1, SECTOR) == b"x" * SECTOR


def test_a_tap_of_its_own_goes_with_it(tmp_path: Path) -> None:
    skip_unless_possible()
    path = tmp_path / "s"
    words = ["unshare", "-n", *command("pileus-net", "--net-backend", f"sock={path},num_queues=4")]
    process = subprocess.Popen(words, env=environment())
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert not path.exists()

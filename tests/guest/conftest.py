"""Fixtures of the guest tests: a factory of guests, and a look at what each test left behind."""

import itertools
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

import pileus.cli.options
from tests.guest import system
from tests.guest.guest import ASSETS, TRIXIE_PVH, Guest, Kernel
from tests.guest.machine import Machine
from tests.guest.system import Network, System

WATCHED = ("/run", "/dev/shm", "/dev/hugepages", "/tmp")  # where a socket or a file could be forgotten
StartGuest = Callable[..., Guest]
StartSystem = Callable[..., System]
NewNetwork = Callable[[], Network]
PASSED = pytest.StashKey[bool]()
# The tests of one shared guest run in one process (xdist's --dist loadgroup).
TRANSPORTS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("pci", "mmio")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process")
    config.addinivalue_line("markers", "needs(option): skipped while pileus has no such option")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _why_not():
        for item in items:
            if "tests/guest" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=reason))
    options = Path(pileus.cli.options.__file__).read_text()
    for item in items:
        for mark in item.iter_markers("needs"):
            if missing := [name for name in mark.args if f'"{name}"' not in options]:
                item.add_marker(pytest.mark.skip(reason=f"pileus has no {' and no '.join(missing)} yet"))


def _why_not() -> str:
    flags = Path("/proc/cpuinfo").read_text().split()
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or not {"vmx", "svm"}.intersection(flags):
        return "KVM cannot run stock kernels here: scripts/test runs these tests where it can"
    if not (ASSETS / "trixie" / "release").exists():
        return "no kernels in .cache/guests: run scripts/guests"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let fixtures see whether the test itself passed: what a failed one left is no news."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartGuest]:
    """A function that starts a guest; after the test none runs, and nothing else is left either."""
    before = _files()
    guests: list[Guest] = []

    def start(
        *more: str,
        kernel: Kernel = TRIXIE_PVH,
        do: str = "report",
        cmdline: str = "console=ttyS0 quiet",
        cpus: str = "1",
        memory: str = "size=512M",
        serial: str | None = "tty",
        console: str = "off",
        terminal: bool = True,
        initramfs: Path | None = None,
    ) -> Guest:
        if not kernel.path.exists():
            pytest.skip(f"{kernel.path.relative_to(ASSETS)} could not be fetched: scripts/guests says why")
        options = ["--kernel", str(kernel.path), "--initramfs", str(initramfs or kernel.initramfs)]
        options += ["--cmdline", f"{cmdline} panic=-1 pileus.do={do}", "--cpus", cpus, "--memory", memory]
        options += ["--console", console, *(["--serial", serial] if serial else []), *more]
        guest = Guest(options, tmp_path / f"log{len(guests)}", terminal=terminal)
        guests.append(guest)
        return guest

    yield start
    running = [guest for guest in guests if guest.process.poll() is None]
    for guest in guests:
        guest.close()
    if not request.node.stash.get(PASSED, False):
        return
    assert not running, "the test ended before pileus did"
    assert not [guest.children() for guest in guests if guest.children()]
    left = {path for path in _files() - before if any(str(guest.process.pid) in path for guest in guests)}
    assert not left, f"left behind: {sorted(left)}"


@pytest.fixture(scope="session")
def network() -> NewNetwork:
    """A function that returns a subnet that no other test uses."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    numbers = itertools.count(10 + 100 * (worker % 2))
    return lambda: Network(next(numbers))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for disk images: on a file system with direct I/O, unlike ``tmp_path`` perhaps."""
    path = system.new_folder()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def debian(network: NewNetwork, folder: Path) -> Iterator[StartSystem]:
    """A function that boots the Debian system with the options of ``System``; none runs after the test."""
    if reason := system.why_not():
        pytest.skip(reason)
    started: list[System] = []

    def start(**options: object) -> System:
        started.append(System([network()], folder, **options))  # type: ignore[arg-type]
        return started[-1].connect()

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="session", params=TRANSPORTS)
def machine(request: pytest.FixtureRequest, network: NewNetwork) -> Iterator[Machine]:
    """A Debian system with one of everything, shared by all tests that ask for it."""
    if reason := system.why_not():
        pytest.skip(reason)
    path = system.new_folder()
    try:
        with Machine([network() for _ in range(3)], path, pci=request.param == "pci") as machine:
            machine.connect().settle()
            yield machine
            assert machine.power_off() == 0
    finally:
        shutil.rmtree(path)


def _files() -> set[str]:
    """Return what lies in the watched folders and in the abstract and named Unix socket tables."""
    found = {str(path) for folder in WATCHED if Path(folder).is_dir() for path in Path(folder).iterdir()}
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return found | {line.split()[7] for line in lines if len(line.split()) > 7}

"""Fixtures of the guest tests: a factory of guests, and a look at what each test left behind."""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.guest.guest import ASSETS, TRIXIE_PVH, Guest, Kernel

WATCHED = ("/run", "/dev/shm", "/dev/hugepages", "/tmp")  # where a socket or a file could be forgotten
StartGuest = Callable[..., Guest]
PASSED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _why_not():
        for item in items:
            if "tests/guest" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=reason))


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
    ) -> Guest:
        if not kernel.path.exists():
            pytest.skip(f"{kernel.path.relative_to(ASSETS)} could not be fetched: scripts/guests says why")
        options = ["--kernel", str(kernel.path), "--initramfs", str(kernel.initramfs)]
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


def _files() -> set[str]:
    """Return what lies in the watched folders and in the abstract and named Unix socket tables."""
    found = {str(path) for folder in WATCHED if Path(folder).is_dir() for path in Path(folder).iterdir()}
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return found | {line.split()[7] for line in lines if len(line.split()) > 7}

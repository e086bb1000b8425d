"""Installs what is missing, builds, and runs every test: ``scripts/test [TIER]… [-- PYTEST-ARGUMENT…]``.

=======  ====================================================================================
lint     ruff and mypy
package  ``pip install`` of the sources into an empty environment gives a working command
unit     tests/unit, natively
guest    tests/guest: guests booted by pileus, all in one emulated machine if this host needs one
peer     tests/peer: programs nobody here wrote
=======  ====================================================================================

The last line is ``N passed, N failed, N skipped``. The exit status is 0 only if nothing failed and each
tier asked for did run.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support import guests, system
from support.host import CACHE, PYTHON, ROOT, TOOLS, ScriptError, run, say
from support.nested import run_nested
from support.setup import setup

RESULTS = CACHE / "results"
GUEST_TIMEOUT = 25 * 60.0  # of one batch
BASICS = {"test_boot", "test_console", "test_memory", "test_pci", "test_power"}
# Two guests at a time: the emulated machine has two processors, and a guest mostly uses one.
GUEST_WORKERS = 2
# Unit tests that skip themselves, in part, where the host's KVM cannot run stock kernels.
NEED_COMPLETE_KVM = [
    "tests/unit/kvm",
    "tests/unit/vmm/test_vmm.py::test_a_triple_fault_is_told_and_resets",
]


@dataclass
class Outcome:
    """What a tier's tests came to."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: "Outcome") -> "Outcome":
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.reasons += other.reasons
        return self

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def main(arguments: list[str]) -> int:
    own, rest = _split(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/test", description="install what is missing, build, run every test"
    )
    parser.add_argument("tiers", nargs="*", metavar="TIER", help=f"{', '.join(TIERS)} (default: all)")
    chosen = parser.parse_args(own).tiers or list(TIERS)
    for tier in chosen:
        if tier not in TIERS:
            parser.error(f"{tier}: a tier is one of {', '.join(TIERS)}")
    setup("test")
    total = Outcome()
    for tier in chosen:
        say(f"--- {tier}")
        started = time.monotonic()
        outcome = TIERS[tier](rest)
        say(f"--- {tier}: {outcome}, {time.monotonic() - started:.0f} s")
        total += outcome
    for reason, count in total.reasons.most_common():
        print(f"skipped {count}: {reason}")
    print(total)
    return 1 if total.failed or not total.passed else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _lint(_: list[str]) -> Outcome:
    tools = TOOLS / "bin"
    sources = ["src", "tests", "scripts", "bench", "fuzz", "examples", "setup.py"]
    checks = [
        [str(tools / "ruff"), "check", "--quiet", *sources],
        [str(tools / "ruff"), "format", "--check", "--quiet", *sources],
        [str(tools / "mypy"), "--python-executable", str(PYTHON)],
        # The scripts are a program of their own, whose root is scripts/.
        ["env", "MYPYPATH=scripts", str(tools / "mypy"), "--strict", "-p", "support"],
        [
            "env",
            "MYPYPATH=scripts",
            str(tools / "mypy"),
            "--strict",
            *map(str, sorted(ROOT.glob("bench/*.py"))),
        ],
    ]
    results = [_passes(command) for command in checks]
    return Outcome(passed=results.count(True), failed=results.count(False))


def _passes(command: list[str]) -> bool:
    done = subprocess.run(command, cwd=ROOT, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        say(f"{' '.join(command)}: status {done.returncode}")
    return done.returncode == 0


def _package(_: list[str]) -> Outcome:
    """Install as the README says, from a copy of what git knows: no file of this checkout alone can help."""
    with tempfile.TemporaryDirectory() as scratch:
        source, venv = Path(scratch, "source"), Path(scratch, "venv")
        source.mkdir()
        files = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split(
            "\0"
        )
        for name in filter(None, files):
            if (ROOT / name).is_file():
                target = source / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((ROOT / name).read_bytes())
        try:
            run(["/usr/bin/python3", "-m", "venv", str(venv)])
            run([str(venv / "bin" / "pip"), "install", "--quiet", str(source)])
            version = run([str(venv / "bin" / "pileus"), "--version"], cwd=scratch)
            run([str(venv / "bin" / "python"), "-c", "import pileus.kvm, pileus.vmm.vmm"], cwd=scratch)
        except ScriptError as error:
            say(str(error))
            return Outcome(failed=1)
        return Outcome(passed=1) if version.startswith("pileus ") else Outcome(failed=1)


def _unit(arguments: list[str]) -> Outcome:
    return _pytest(
        "unit", lambda command: subprocess.run(command, cwd=ROOT, check=False).returncode, arguments
    )


def _peer(arguments: list[str]) -> Outcome:
    if not any((ROOT / "tests" / "peer").glob("test_*.py")):
        return Outcome()
    return _pytest(
        "peer", lambda command: subprocess.run(command, cwd=ROOT, check=False).returncode, arguments
    )


def _guest(arguments: list[str]) -> Outcome:
    """Run the guest tests; whatever they read a lot goes into the emulated machine's memory at its start."""
    run([str(PYTHON), "-m", "compileall", "-q", "src", "tests"], cwd=ROOT)
    wanted = ("vmlinuz", "vmlinux", "vmlinux-nopvh", "initramfs.cpio")
    assets = [path for name in wanted for path in sorted(guests.GUESTS.glob(f"*/{name}"))]
    copy = [ROOT / ".venv", ROOT / "src", ROOT / "tests", *assets]

    def start(command: list[str]) -> int:
        return run_nested(
            command,
            write=[RESULTS],
            copy=copy,
            disks=system.scratch_disks(),
            modules=["tun"],
            timeout=GUEST_TIMEOUT,
        )

    outcome = Outcome()
    for name, files in _guest_batches().items():
        outcome += _guest_batch(name, [*files, *arguments], start)
    if any("KVM cannot run" in reason for reason in outcome.reasons):
        # They ran where scripts/nested put them, so that KVM should have been complete.
        say("the guest tests were skipped though this machine can run them")
        outcome.failed += 1
    return outcome


def _guest_batches() -> dict[str, list[str]]:
    """The files of each emulated machine: one that dies takes few results with it."""
    found = sorted((ROOT / "tests" / "guest").glob("test_*.py"))
    batches: dict[str, list[str]] = {"basics": [*NEED_COMPLETE_KVM]}
    for path in found:
        batch = "basics" if path.stem in BASICS else path.stem.removeprefix("test_")
        batches.setdefault(batch, []).append(str(path.relative_to(ROOT)))
    return batches


def _guest_batch(name: str, arguments: list[str], start: Callable[[list[str]], int]) -> Outcome:
    """One batch; again, once, if the emulated machine died under it, as an emulated kernel sometimes does."""
    # loadgroup: tests that share a guest run in one process.
    spread = ["-n", str(GUEST_WORKERS), "--dist", "loadgroup", "-v"]
    for attempt in range(2):
        outcome = _pytest(f"guest-{name}", start, [*spread, *arguments], folders=[])
        if (RESULTS / f"guest-{name}.xml").exists():
            break
        if attempt == 0:
            say(f"the emulated machine died under the batch {name}: once more")
    return outcome


def _pytest(
    tier: str, start: Callable[[list[str]], int], arguments: list[str], folders: list[str] | None = None
) -> Outcome:
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{tier}.xml"
    report.unlink(missing_ok=True)
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        *([f"tests/{tier}"] if folders is None else folders),
        f"--junit-xml={report}",
        "-p",
        "no:cacheprovider",
    ]
    sys.stdout.flush()
    status = start([*command, *arguments])
    try:
        outcome = _read_report(report)
    except (OSError, ET.ParseError):
        say(f"the {tier} tests ended with status {status} and without a report")
        return Outcome(failed=1)
    if status and not outcome.failed:
        say(f"pytest ended with status {status}")
        outcome.failed += 1
    return outcome


def _read_report(path: Path) -> Outcome:
    outcome = Outcome()
    for case in ET.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        elif skipped is not None:
            outcome.skipped += 1
            outcome.reasons[skipped.get("message", "")] += 1
        else:
            outcome.passed += 1
    return outcome


TIERS: dict[str, Callable[[list[str]], Outcome]] = {
    "lint": _lint,
    "package": _package,
    "unit": _unit,
    "guest": _guest,
    "peer": _peer,
}

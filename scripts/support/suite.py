"""Installs what is missing, builds, runs every test: ``scripts/test [--long] [TIER]… [-- PYTEST-ARGUMENT…]``.

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
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from support import guests, nvme, system
from support.host import CACHE, PYTHON, ROOT, TOOLS, ScriptError, has_full_kvm, run, say
from support.nested import run_nested
from support.setup import setup

RESULTS = CACHE / "results"
NOT_LONG = ["-m", "not long"]
GUEST_TIMEOUT = 40 * 60.0  # of one batch
GUEST_PATIENCE = 7 * 60.0  # for the next result
GUEST_MACHINES = 4  # for one batch
NO_TESTS = 5  # pytest's status where none was left
GUEST_BUDGET = 77 * 60.0  # of all batches: a run that takes longer says where it stood
LONGER = 5  # times all of these with --long
BATCH = "PILEUS_TEST_BATCH"  # the name of the only one to run
# The files of each emulated machine: few enough to end before its buffer of translated code is full, of
# which guests die (docs/nested.md).
BATCHES = {
    "boot": {"test_boot", "test_console", "test_irqchip"},
    "memory": {"test_memory", "test_pci", "test_power"},
    "machine": {"test_devices", "test_disks", "test_network"},  # they share two Debian guests
    "reference": {"test_reference"},
    "sockets": {"test_api", "test_vsock"},
    "direct": {"test_fs", "test_iommu", "test_pmem", "test_vfio_user"},
    "host-devices": {"test_vfio"},
}
# What an emulated machine of this batch has besides.
MACHINES: dict[str, dict[str, Any]] = {"host-devices": nvme.MACHINE}
# Two guests at a time: the emulated machine has two processors, and a guest mostly uses one.
GUEST_WORKERS = 2
# Unit tests that skip themselves, in part, where the host's KVM cannot run stock kernels.
NEED_COMPLETE_KVM = [
    "tests/unit/kvm",
    "tests/unit/vm/test_persistent.py::test_a_guest_that_touches_what_was_cut_off_is_stopped_with_a_reason",
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
    parser.add_argument("--long", action="store_true", help="the tests that take minutes each as well")
    options = parser.parse_args(own)
    chosen = options.tiers or list(TIERS)
    if not options.long:
        rest = [*NOT_LONG, *rest]
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
    mypy = [str(tools / "mypy"), "--python-executable", str(PYTHON)]
    strict = ["env", "MYPYPATH=scripts", *mypy, "--strict"]
    checks = [
        [str(tools / "ruff"), "check", "--quiet", *sources],
        [str(tools / "ruff"), "format", "--check", "--quiet", *sources],
        mypy,
        # The scripts are a program of their own, whose root is scripts/.
        [*strict, "-p", "support"],
        [*strict, *map(str, sorted(ROOT.glob("bench/*.py")))],
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
    return _native("unit", arguments)


def _peer(arguments: list[str]) -> Outcome:
    return _native("peer", arguments)


def _guest(arguments: list[str]) -> Outcome:
    """Run the guest tests; whatever they read a lot goes into the emulated machine's memory at its start."""
    run([str(PYTHON), "-m", "compileall", "-q", "src", "tests"], cwd=ROOT)
    wanted = ("vmlinuz", "vmlinux", "vmlinux-nopvh", "initramfs.cpio")
    assets = [path for name in wanted for path in sorted(guests.GUESTS.glob(f"*/{name}"))]
    copy = [ROOT / ".venv", ROOT / "src", ROOT / "tests", *assets]
    scale = 1 if NOT_LONG[1] in arguments else LONGER
    end = time.monotonic() + GUEST_BUDGET * scale

    def start(name: str, command: list[str], log: Path) -> int:
        if (left := end - time.monotonic()) < 60:
            raise ScriptError("the guest tests have had their time")
        return run_nested(
            command,
            write=[RESULTS],
            copy=copy,
            disks=system.scratch_disks(),
            **({"modules": ["tun"]} | MACHINES.get(name, {})),
            timeout=min(GUEST_TIMEOUT * scale, left),
            progress=(log, GUEST_PATIENCE * scale),
        )

    nvme.make_image()
    outcome = Outcome()
    for name, files in _guest_batches().items():
        if os.environ.get(BATCH, name) == name:
            started = time.monotonic()
            batch = _guest_batch(name, [*files, *arguments], partial(start, name))
            say(f"--- guest, batch {name}: {batch}, {time.monotonic() - started:.0f} s")
            outcome += batch
    if any("KVM cannot run" in reason for reason in outcome.reasons):
        # They ran where scripts/nested put them, so that KVM should have been complete.
        say("the guest tests were skipped though this machine can run them")
        outcome.failed += 1
    return outcome


def _guest_batches() -> dict[str, list[str]]:
    """The files of each emulated machine."""
    batches: dict[str, list[str]] = {"memory": [*NEED_COMPLETE_KVM]}
    for path in sorted((ROOT / "tests" / "guest").glob("test_*.py")):
        batch = next((name for name, stems in BATCHES.items() if path.stem in stems), "others")
        batches.setdefault(batch, []).append(str(path.relative_to(ROOT)))
    return batches


def _guest_batch(name: str, arguments: list[str], start: Callable[[list[str], Path], int]) -> Outcome:
    """One batch. If the emulated machine dies under it, another takes what has not ended yet.

    Emulated processors now and then deliver an interrupt twice, of which a guest in its entry code dies
    (docs/nested.md). So a test that failed in an emulated machine is run once more in another.
    """
    # loadgroup: tests that share a guest run in one process.
    spread = ["-n", str(GUEST_WORKERS), "--dist", "loadgroup", "-v"]
    log, status = _until_ended(f"guest-{name}", start, [*spread, *arguments])
    outcome = log.outcome
    if log.complete and log.failed and not has_full_kvm():
        say(f"failed in an emulated machine, and tried once more: {', '.join(log.failed)}")
        again, status = _until_ended(f"guest-{name}-again", start, [*spread, *log.failed])
        outcome.passed += again.outcome.passed
        outcome.failed -= again.outcome.passed
    return _checked(outcome, status)


def _until_ended(
    tier: str, start: Callable[[list[str], Path], int], arguments: list[str]
) -> "tuple[Log, int]":
    """The tests of ``arguments``, in as many machines as it takes, up to a bound: those die now and then."""
    total = Log()
    for _ in range(GUEST_MACHINES):
        rest = [word for test in total.ended for word in ("--deselect", test)]
        log, status = _pytest(tier, start, [*rest, *arguments], folders=[])
        total.outcome += log.outcome
        total.ended += log.ended
        total.failed += log.failed
        if log.complete:
            total.complete = True
            return total, 0 if status == NO_TESTS and total.ended else status
        say(f"the emulated machine ended with status {status} under {tier}: another takes the rest")
    total.outcome.failed += 1
    return total, status


def _native(tier: str, arguments: list[str]) -> Outcome:
    def start(command: list[str], _: Path) -> int:
        return subprocess.run(command, cwd=ROOT, check=False).returncode

    log, status = _pytest(tier, start, arguments, folders=[f"tests/{tier}"])
    return _checked(log.outcome, status if log.complete else status or 1)


def _checked(outcome: Outcome, status: int) -> Outcome:
    if status and not outcome.failed:
        say(f"pytest ended with status {status}")
        outcome.failed += 1
    return outcome


@dataclass
class Log:
    """What pytest wrote down line by line, even if its machine died."""

    outcome: Outcome = field(default_factory=Outcome)
    ended: list[str] = field(default_factory=list)  # the tests that did
    failed: list[str] = field(default_factory=list)  # those of them that failed
    complete: bool = False


def _pytest(
    tier: str, start: Callable[[list[str], Path], int], arguments: list[str], folders: list[str]
) -> tuple[Log, int]:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{tier}.jsonl"
    path.write_bytes(b"")
    command = [str(PYTHON), "-m", "pytest", *folders, f"--report-log={path}", "-p", "no:cacheprovider"]
    sys.stdout.flush()
    try:
        status = start([*command, *arguments], path)
    except ScriptError as error:
        say(str(error))
        status = 1
    return _read_log(path), status


def _read_log(path: Path) -> Log:
    log = Log()
    worst: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # its machine died over it
        kind, test = entry["$report_type"], entry.get("nodeid", "").partition("@")[0]
        if kind == "SessionFinish":
            log.complete = True
        elif kind == "CollectReport" and entry["outcome"] == "failed":
            log.outcome.failed += 1
        elif kind == "TestReport":
            if entry["outcome"] == "skipped":
                reason = (
                    entry["longrepr"][2] if isinstance(entry["longrepr"], list) else str(entry["longrepr"])
                )
                log.outcome.reasons[reason.removeprefix("Skipped: ")] += 1
            if worst.get(test, "passed") == "passed":
                worst[test] = entry["outcome"]
            if entry["when"] == "teardown":
                log.ended.append(test)
    log.failed = [test for test in log.ended if worst[test] == "failed"]
    counts = Counter(worst[test] for test in log.ended)
    log.outcome.passed, log.outcome.failed, log.outcome.skipped = (
        counts["passed"],
        log.outcome.failed + counts["failed"],
        counts["skipped"],
    )
    return log


TIERS: dict[str, Callable[[list[str]], Outcome]] = {
    "lint": _lint,
    "package": _package,
    "unit": _unit,
    "guest": _guest,
    "peer": _peer,
}

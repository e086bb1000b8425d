"""Runs a benchmark of bench/ beside its peer: ``scripts/bench NAME [--json FILE]``, ``scripts/bench --list``.

A benchmark is a module with a docstring, ``GOALS`` (what scripts/setup must reach) and
``run(options: Options) -> list[Row]``. Peers run interleaved with pileus in one run; figures are medians;
a ratio of 1 is level with the peer and more is better for pileus.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from support.host import ROOT, ScriptError, kvm_flavour
from support.setup import setup

BENCH = ROOT / "bench"


@dataclass
class Options:
    runs: int  # how often each figure is taken
    part: str  # "" for the whole; a benchmark's own word when it calls itself where KVM is complete


@dataclass
class Row:
    metric: str
    unit: str
    pileus: float
    peer: float | None
    peer_name: str
    ratio: float | None
    runs: int
    goal: str = ""  # where pileus stands against DESIGN section 4


def compare(
    metric: str, unit: str, pileus: list[float], peer_name: str, peer: list[float], *, goal: float = 1
) -> Row:
    """Return the row of a figure of which less is better; ``goal`` is the ratio to reach, 0 for none."""
    own, other = statistics.median(pileus), statistics.median(peer) if peer else None
    ratio = other / own if other is not None else None
    verdict = (
        "" if ratio is None or not goal else f"{'reached' if ratio >= goal else 'missed'} (ratio {goal:g})"
    )
    return Row(metric, unit, own, other, peer_name, ratio, len(pileus), verdict)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="compare pileus with a peer in one run"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the benchmark to run")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--runs", type=int, default=0, help="how often each figure is taken")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    names = sorted(path.stem for path in BENCH.glob("[a-z]*.py"))
    if given.list:
        for name in names:
            print(f"{name:12} {(_load(name).__doc__ or '').partition(chr(10))[0]}")
        return 0
    if given.name not in names:
        raise ScriptError(f"{given.name or 'no name'}: a benchmark is one of {', '.join(names)}")
    module = _load(given.name)
    if not given.part:
        setup(*module.GOALS)
    rows = module.run(Options(given.runs, given.part))
    if given.json:
        machine = f"{os.cpu_count()} x {_cpu_model()}, Linux {platform.release()}, KVM: {kvm_flavour()}"
        document = {"name": given.name, "machine": machine, "rows": [asdict(row) for row in rows]}
        Path(given.json).write_text(json.dumps(document, indent=2) + "\n")
    if not given.part:
        _print(rows)
    return 0


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _print(rows: list[Row]) -> None:
    head = ("metric", "pileus", "peer", "", "unit", "ratio", "runs", "DESIGN section 4")
    table = [head]
    for row in rows:
        peer = f"{row.peer:.2f}" if row.peer is not None else "-"
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
        table.append(
            (row.metric, f"{row.pileus:.2f}", peer, row.peer_name, row.unit, ratio, str(row.runs), row.goal)
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

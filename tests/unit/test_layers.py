"""Imports between rooms point one way."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "pileus"
LEAVES = {"errors", "log", "cleanup", "config", "_posix"}  # anyone may use these
ARROWS = {  # room -> the rooms it may import, besides itself and the leaves
    "cli": {"vmm"},
    "vmm": {"vm", "console", "kvm"},
    "vm": {"arch", "boot", "devices", "console", "bus", "memory", "kvm"},
    "arch": {"boot", "memory", "kvm"},
    "boot": {"arch.x86_64.layout", "memory"},
    "devices": {"console", "bus"},
    "console": set(),
    "kvm": {"bus"},
    "memory": set(),
    "bus": set(),
    "config": set(),
    "errors": set(),
    "log": set(),
    "cleanup": set(),
    "_posix": set(),
}
CYTHON_IMPORT = re.compile(
    r"^\s*(?:from\s+(pileus[\w.]*)\s+c?import\s+\(?([\w, ]*)|c?import\s+(pileus[\w.]*))", re.M
)


def imports(path: Path) -> Iterator[str]:
    """The full names that a module imports from pileus, also late and for types only."""
    text = path.read_text()
    if path.suffix in (".pyx", ".pxd"):
        for package, names, module in CYTHON_IMPORT.findall(text):
            yield from (f"{package}.{name.strip()}" for name in names.split(",")) if package else [module]
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


MODULES = sorted(path for suffix in ("py", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{suffix}"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        here = "errors"  # the package itself imports nothing
    for name in imports(path):
        if not name.startswith("pileus."):
            continue
        target = name.removeprefix("pileus.")
        allowed = {here, "errors", "__version__"} | (set() if here in LEAVES else ARROWS[here] | LEAVES)
        assert any(target == each or target.startswith(f"{each}.") for each in allowed), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_absolute(path: Path) -> None:
    """A relative one would pass by the arrows."""
    assert not re.search(r"^\s*from\s+\.", path.read_text(), re.M)


def test_every_room_has_its_arrows() -> None:
    assert {room(path) for path in MODULES} - {"__init__"} <= set(ARROWS)

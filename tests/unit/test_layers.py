"""Imports between rooms point one way."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "pileus"
LEAVES = {"errors", "log", "cleanup", "config", "listener", "loop", "_posix"}  # anyone may use these
ARROWS = {  # room -> the rooms it may import, besides itself and the leaves
    "__init__": {"sdk"},  # names that are resolved on first use
    "cli": {"api", "vmm", "sdk", "vhost_user", "virtio"},
    "sdk": {"api", "vmm", "net", "kvm", "virtio.device"},
    "api": {"vmm"},
    "vmm": {"vm", "console", "kvm", "virtio.device"},
    "vm": {
        "arch",
        "boot",
        "devices",
        "pci",
        "virtio",
        "vhost_user",
        "vfio",
        "vfio_user",
        "block",
        "net",
        "console",
        "bus",
        "memory",
        "kvm",
    },
    "virtio": {"pci", "block", "net", "fs", "console", "bus", "memory"},
    "pci": {"bus"},
    "block": set(),
    "net": set(),
    "fs": set(),
    "vhost_user": {"virtio", "block", "net", "fs", "memory"},
    "vfio": {"pci", "bus", "memory"},
    "vfio_user": {"vfio", "pci", "bus", "memory"},
    "testing": {"virtio", "block", "memory"},
    "arch": {"memory", "kvm"},
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
    "listener": set(),
    "loop": set(),
    "_posix": set(),
}
CYTHON_IMPORT = re.compile(
    r"^\s*(?:from\s+([.\w]+)\s+c?import\s+(?:\(([^)]*)\)|([^\n#]*))|c?import\s+([^\n#]*))", re.M
)


def imports_of_python(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            yield from (f"{package}.{alias.name}" for alias in node.names)


def imports_of_cython(text: str) -> Iterator[str]:
    for package, inside, names, modules in CYTHON_IMPORT.findall(text):
        for each in (inside or names or modules).split(","):
            if name := each.partition(" as ")[0].strip():
                yield f"{package}.{name}" if package else name


def imports(path: Path) -> list[str]:
    """The full names that a module imports, also late and for types only; a relative one keeps its dots."""
    parse = imports_of_python if path.suffix == ".py" else imports_of_cython
    return list(parse(path.read_text()))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


MODULES = sorted(path for suffix in ("py", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{suffix}"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        assert not name.startswith("."), f"{name}: a name in full shows the room it comes from"
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
    assert {room(path) for path in MODULES} <= set(ARROWS)


FORMS = {
    "import pileus.vm.vm": ["pileus.vm.vm"],
    "import os, pileus.vm as machine": ["os", "pileus.vm"],
    "from pileus import vm": ["pileus.vm"],
    "from pileus.vm import (\n    builder,\n    vm,\n)": ["pileus.vm.builder", "pileus.vm.vm"],
    "from ..vm import vm as machine": ["..vm.vm"],
    "if True:\n    from pileus.vm.vm import Vm  # late": ["pileus.vm.vm.Vm"],
}
CYTHON_FORMS = FORMS | {
    "cimport pileus.bus._bus": ["pileus.bus._bus"],
    "cimport libc.stdio, pileus.bus": ["libc.stdio", "pileus.bus"],
    "from pileus.bus._bus cimport (Bus,\n  Device)": ["pileus.bus._bus.Bus", "pileus.bus._bus.Device"],
    "from . cimport _bus": [".._bus"],
}


@pytest.mark.parametrize("text", FORMS)
def test_each_form_of_an_import_is_seen_in_python(text: str) -> None:
    assert list(imports_of_python(text)) == FORMS[text]


@pytest.mark.parametrize("text", CYTHON_FORMS)
def test_each_form_of_an_import_is_seen_in_cython(text: str) -> None:
    assert list(imports_of_cython(text)) == CYTHON_FORMS[text]


def test_no_two_rooms_import_each_other() -> None:
    """But that ``boot`` reads the layout, which imports nothing."""
    rooms = {here: {name for name in allowed if "." not in name} for here, allowed in ARROWS.items()}
    reached = {here: set(allowed) for here, allowed in rooms.items()}
    for _ in rooms:
        for here in rooms:
            reached[here] |= {far for near in reached[here] for far in reached[near]}
    assert [here for here in rooms if here in reached[here]] == []
    assert imports(PACKAGE / "arch" / "x86_64" / "layout.py") == []

"""Installs what is missing and builds pileus: ``scripts/setup [build|guest|nested|test|bench]…``.

=======  =====================================================================================
build    pileus itself in .venv: all that someone with a KVM host needs (the default, with rest)
guest    kernels and an initramfs to boot, made of Debian packages
system   a Debian 13 system to boot from a disk
nested   an emulated machine with KVM, for hosts where KVM cannot run stock kernels
test     what scripts/test needs beside these
bench    the peers of scripts/bench
=======  =====================================================================================

Each step looks first whether it is needed; when none is, the whole takes well under a second.
"""

import argparse
import os
import tomllib
from pathlib import Path

from support import apt
from support.host import PYTHON, ROOT, TOOLS, VENV, digest, has_full_kvm, only_one, run, say, stamp, stamped

PACKAGES = {
    "build": ["python3-dev", "python3-venv", "build-essential", "zlib1g-dev", "libzstd-dev"],
    "guest": ["busybox-static", "e2fsprogs", "kmod", "xz-utils", "zstd"],
    "system": ["mmdebstrap", "e2fsprogs", "openssh-client", "xfsprogs"],
    "nested": ["kmod", "busybox-static", "xz-utils", "zstd", "lz4"],
    "test": [
        "acpica-tools",
        "curl",
        "gdb",
        "git",
        "iperf3",
        "iproute2",
        "iputils-ping",
        "ndctl",
        "qemu-utils>=10",
        "socat",
    ],
    "bench": ["qemu-system-x86>=10", "qemu-utils>=10", "iproute2"],
}
NEEDS = {  # a goal and the goals it rests on
    "build": [],
    "guest": [],
    "system": ["guest"],
    "nested": [],
    "test": ["build", "guest", "system"],
    "bench": ["build", "guest"],
}
TOOL_REQUIREMENTS = {
    "build": ["cython>=3.1,<4", "setuptools>=68", "wheel"],
    "test": ["ruff>=0.6", "mypy>=1.11"],
}
VENV_REQUIREMENTS = {
    "test": [
        "drgn>=0.0.30",
        "pytest>=8,<9.2",  # with 9.2 xdist groups nothing (its issue 1386): shared guests would boot twice
        "pytest-reportlog>=0.4",
        "pytest-xdist>=3",
        "hypothesis>=6.100",
        "openapi-spec-validator>=0.7",
        "schemathesis>=4,<5",
    ]
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/setup", description="install what is missing and build pileus"
    )
    parser.add_argument("goals", nargs="*", metavar="GOAL", help=f"{', '.join(NEEDS)} (default: all)")
    chosen = parser.parse_args(arguments).goals or list(NEEDS)
    for goal in chosen:
        if goal not in NEEDS:
            parser.error(f"{goal}: a goal is one of {', '.join(NEEDS)}")
    setup(*chosen)
    return 0


def setup(*goals: str) -> None:
    """Reach ``goals``, and ``nested`` with any that boots guests where this host cannot."""
    wanted = dict.fromkeys(step for goal in goals for step in (*NEEDS[goal], goal))
    if not has_full_kvm() and wanted.keys() & {"test", "bench"}:
        wanted["nested"] = None
    with only_one("setup"):
        apt.install(list(dict.fromkeys(name for goal in wanted for name in PACKAGES[goal])))
        _tools([name for goal in wanted for name in TOOL_REQUIREMENTS.get(goal, [])])
        if "build" in wanted:
            _venv()
            _extensions()
        _venv_requirements([name for goal in wanted for name in VENV_REQUIREMENTS.get(goal, [])])
        if "guest" in wanted:
            from support import guests

            guests.fetch()
        if "test" in wanted:
            from support import peers

            peers.fetch()
        if "system" in wanted:
            from support import system

            system.build()
        if "nested" in wanted and not has_full_kvm():
            from support import emulator, guests

            emulator.fetch()
            guests.fetch_host_kernel()


def _tools(requirements: list[str]) -> None:
    python = TOOLS / "bin" / "python"
    if not python.exists():
        apt.install(PACKAGES["build"][:2])
        say("setup: creating .cache/tools")
        run(["/usr/bin/python3", "-m", "venv", "--clear", str(TOOLS)])
        for old in ("tools-pip", "venv-pip"):
            stamp(old, "")
    _pip("tools-pip", python, requirements)


def _venv_requirements(requirements: list[str]) -> None:
    _pip("venv-pip", PYTHON, requirements)


def _pip(name: str, python: Path, requirements: list[str]) -> None:
    """Install ``requirements`` beside what earlier runs installed; the stamp lists them all."""
    path = ROOT / ".cache" / "stamps" / name
    have = path.read_text().split() if path.exists() else []
    lacking = [wish for wish in requirements if wish not in have]
    if not lacking:
        return
    say(f"setup: pip install {' '.join(lacking)}")
    # The tools' own pip serves both environments, so that .venv holds nothing that costs start-up.
    pip = [str(TOOLS / "bin" / "python"), "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--retries", "5", *lacking])
    stamp(name, " ".join([*have, *lacking]))


def _venv() -> None:
    """Make .venv, where pileus is on the path by a plain ``.pth`` line.

    What changes in src/ counts at once and only changed Cython is compiled again. Compared with a
    copy in site-packages an import costs one more failed look-up in a directory listing that Python
    has cached already. Without pip and setuptools there is no other ``.pth`` file to run at start-up.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    commands = [ROOT / name for name in settings["tool"]["setuptools"]["script-files"]]
    dependencies = settings["project"].get("dependencies", [])
    key = digest(
        [str(ROOT).encode(), *(path.read_bytes() for path in commands), " ".join(dependencies).encode()]
    )
    if stamped("venv", key) and PYTHON.exists():
        return
    say("setup: creating .venv")
    run(["/usr/bin/python3", "-m", "venv", "--clear", "--without-pip", str(VENV)])
    stamp("venv-pip", "")
    (site,) = VENV.glob("lib/python3*/site-packages")
    (site / "pileus.pth").write_text(f"{ROOT / 'src'}\n")
    for path in commands:
        # As pip does with a script: its "#!python" becomes the environment's own interpreter.
        command = VENV / "bin" / path.name
        command.write_text(path.read_text().replace("#!python", f"#!{PYTHON}", 1))
        command.chmod(0o755)
    _venv_requirements(dependencies)
    stamp("venv", key)


def _extensions() -> None:
    sources = [path for suffix in ("pyx", "pxd", "h") for path in sorted((ROOT / "src").rglob(f"*.{suffix}"))]
    inputs = [ROOT / "setup.py", ROOT / "pyproject.toml", *sources]
    key = digest(
        part for path in inputs for part in (str(path.relative_to(ROOT)).encode(), path.read_bytes())
    )
    modules = [path for path in sources if path.suffix == ".pyx"]
    built = all(any(path.parent.glob(f"{path.stem}.*.so")) for path in modules)
    if stamped("extensions", key) and built:
        return
    say(f"setup: compiling {len(modules)} extension modules")
    _forget_stale_modules({path.with_suffix("") for path in modules})
    jobs = str(os.cpu_count() or 1)
    run(
        [str(TOOLS / "bin" / "python"), "setup.py", "--quiet", "build_ext", "--inplace", "-j", jobs], cwd=ROOT
    )
    stamp("extensions", key)


def _forget_stale_modules(current: set[Path]) -> None:
    """Remove compiled modules whose source is gone, which would still be imported."""
    for library in (ROOT / "src").rglob("*.so"):
        if library.with_name(library.name.partition(".")[0]) not in current:
            library.unlink()

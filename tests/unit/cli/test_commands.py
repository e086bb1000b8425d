"""The commands as they are installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pileus import __version__

ROOT = Path(__file__).parents[3]


def run(name: str, *words: str) -> str:
    return subprocess.run(
        [sys.executable, str(ROOT / "bin" / name), *words],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout


def test_pileus_has_its_own_version() -> None:
    assert run("pileus", "--version") == f"pileus {__version__}\n"


def test_pileus_remote_has_the_same() -> None:
    assert run("pileus-remote", "--version") == f"pileus-remote {__version__}\n"


def test_cloud_hypervisor_has_one_that_its_tools_accept() -> None:
    version = re.fullmatch(r"cloud-hypervisor v(\d+)\.\d+\.\d+\n", run("cloud-hypervisor", "--version"))
    assert version is not None
    assert int(version[1]) >= 40


@pytest.mark.parametrize("name", ["pileus", "cloud-hypervisor"])
def test_both_take_the_same_options(name: str) -> None:
    assert "--api-socket" in run(name, "--help")

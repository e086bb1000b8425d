"""Each file of examples/ runs as it says; those that boot a guest do so in tests/guest/test_examples.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pileus.kvm.probe import OVERRIDE
from tests.unit import tiny
from tests.unit.api.conftest import real_api
from tests.unit.api.harness import Api

__all__ = ["real_api"]
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")


def run(name: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, words)],
        env=os.environ | {OVERRIDE: "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel(folder: Path) -> Path:
    (folder / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    return folder / "kernel"


def test_a_client_leads_a_vm_through_its_life(real_api: Api, tmp_path: Path) -> None:
    told = run("api_client", real_api.path, kernel(tmp_path)).splitlines()
    assert told[0].startswith("there is pileus v")
    assert told[1:4] == ["boot -> Running", "pause -> Paused", "resume -> Running"]
    assert told[4].startswith("refused with 409: cannot boot a VM that is Running")
    assert real_api.client().get("vm.info")[0] == 404


def test_a_device_of_plain_python_serves_its_driver() -> None:
    assert run("own_device") == "the guest has [4, 4, 4, 4, 4, 4]\n"


@needs_kvm
def test_a_core_is_written(tmp_path: Path) -> None:
    told = run("coredump", kernel(tmp_path), tmp_path / "core")
    assert told == f"{tmp_path}/core has the memory of a VM that is Running\n"
    assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"


def test_each_example_is_run_by_a_test() -> None:
    tests = Path(__file__).read_text() + (ROOT / "tests" / "guest" / "test_examples.py").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert example.stem in tests, example.name


def test_a_command_in_a_guest_takes_fewer_than_20_lines() -> None:
    assert len((EXAMPLES / "guest_command.py").read_text().splitlines()) < 20

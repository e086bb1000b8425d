"""What a start imports: each of these modules costs every VM milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import tiny

SOURCES = Path(__file__).parents[2] / "src"
BANNED = {
    "argparse", "asyncio", "collections", "contextlib", "dataclasses", "enum", "h11", "importlib.metadata",
    "inspect", "json", "logging", "msgspec", "pathlib", "re", "rich", "signal", "socket", "subprocess",
    "threading", "typing",
}  # fmt: skip
SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from pileus.cli.main import main
status = main(sys.argv[1:])
print(*sorted(sys.modules))
sys.exit(status)
"""


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
@pytest.mark.parametrize("serial", ["tty", "null", "off"])
def test_a_whole_run_imports_nothing_slow(tmp_path: Path, serial: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny.elf(tiny.POWER_OFF))
    words = ["-S", "-E", "-c", SCRIPT, str(SOURCES), "--kernel", str(kernel), "--serial", serial]
    result = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PILEUS_ANY_KVM": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "pileus.vm.builder" in loaded
    assert not loaded & BANNED

"""What a start imports: each of these modules costs every VM milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import tiny

SOURCES = Path(__file__).parents[2] / "src"
BANNED = {
    "argparse", "asyncio", "collections", "collections.abc", "contextlib", "dataclasses", "enum", "functools",
    "h11", "importlib.metadata", "inspect", "json", "logging", "msgspec", "pathlib", "re", "rich", "signal",
    "socket", "subprocess", "threading", "typing",
}  # fmt: skip
BARE = [sys.executable, "-S", "-E"]  # no .pth file of a site may import what we must not
SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from pileus.cli.main import main
status = main(sys.argv[1:])
print(*sorted(sys.modules))
sys.exit(status)
"""


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
# Not "socket=": who asks for a socket gets the module, and what that imports.
@pytest.mark.parametrize("serial", ["tty", "null", "off", "pty", "file=FOLDER/out"])
@pytest.mark.parametrize("pvh", [True, False], ids=["pvh", "64-bit entry"])
def test_a_whole_run_imports_nothing_slow(tmp_path: Path, serial: str, pvh: bool) -> None:
    kernel, ram = tmp_path / "kernel", tmp_path / "ram"
    kernel.write_bytes(
        tiny.elf(tiny.power_off_on_boot(3, tiny.ACPI_RESET) if pvh else tiny.POWER_OFF, pvh=pvh)
    )
    ram.touch()
    words = ["--kernel", str(kernel), "--serial", serial.replace("FOLDER", str(tmp_path))]
    words += ["--memory", f"size=16M,file={ram}", "--cpus", "2"]
    words += ["--vsock", f"cid=3,socket={tmp_path}/vsock"]
    words += ["--pmem", f"file={tmp_path},size=2M", f"file={tmp_path},size=2M,nvdimm=on"]
    result = subprocess.run(
        [*BARE, "-c", SCRIPT, str(SOURCES), *words],
        env=os.environ | {"PILEUS_ANY_KVM": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "pileus.vm.builder" in loaded
    assert (loaded - bare_modules()) & BANNED == set()


def bare_modules() -> set[str]:
    """What an interpreter has loaded before it runs a line of ours."""
    words = [*BARE, "-c", "import sys; print(*sys.modules)"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    return set(told.split())

"""The checkout and the host: paths, whether stock kernels run here, commands that may fail."""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache"
STAMPS = CACHE / "stamps"
VENV = ROOT / ".venv"  # pileus and what its tests import
TOOLS = CACHE / "tools"  # pip, Cython, linters, virtme-ng: never on pileus's own path
PYTHON = VENV / "bin" / "python"
PILEUS = VENV / "bin" / "pileus"


class ScriptError(Exception):
    """One sentence for the user; the script ends with status 1."""


def say(text: str) -> None:
    """Say what is being done, on stderr: stdout belongs to what the script was asked to run."""
    print(text, file=sys.stderr, flush=True)


def run(command: list[str], **options: object) -> str:
    """Return the output of ``command``, or raise ScriptError with the last lines it wrote."""
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise ScriptError(f"{' '.join(command)} ended with status {done.returncode}:\n{tail}")
    return str(done.stdout)


def kvm_flavour() -> str:
    """Return "full" where stock kernels run under /dev/kvm, else the reason why they do not."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not usable here"
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    if "vmx" not in flags and "svm" not in flags:
        return "the processor offers neither vmx nor svm"
    if Path("/sys/module/kvm_pvm").exists():
        return "/dev/kvm is backed by kvm_pvm, which cannot run stock kernels"
    return "full"


def has_full_kvm() -> bool:
    return kvm_flavour() == "full"


def digest(parts: Iterable[bytes]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def stamped(name: str, value: str) -> bool:
    """Return whether the step ``name`` was last done for this very ``value``."""
    with contextlib.suppress(OSError):
        return (STAMPS / name).read_text() == value
    return False


def stamp(name: str, value: str) -> None:
    STAMPS.mkdir(parents=True, exist_ok=True)
    (STAMPS / name).write_text(value)


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Hold a lock of this checkout: two scripts at once must not build or fetch the same thing twice."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

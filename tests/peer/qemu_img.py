"""qemu-img, which nobody here wrote, as a judge of images."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="no qemu-img (package qemu-utils)")


MEMORY = "/dev/shm"
ROOM = 1 << 30  # bytes


def memory_folder(otherwise: Path) -> Iterator[Path]:
    """A folder in memory where there is room: on a busy disk qemu-img's syncs take seconds."""
    try:
        status = os.statvfs(MEMORY)
        has_room = status.f_bavail * status.f_frsize >= ROOM
    except OSError:
        has_room = False
    if not has_room:
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def qemu_img(*words: object, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["qemu-img", *map(str, words)], check=False, capture_output=True, text=True, timeout=60
    )
    assert may_fail or done.returncode == 0, (words, done.stdout, done.stderr)
    return done


def check(path: Path, *, leaks: bool = False) -> None:
    """No error in the image; nor clusters lost, unless those are allowed."""
    done = qemu_img("check", "-f", "qcow2", path, may_fail=True)
    assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout + done.stderr


def holds(path: Path, data: bytes) -> None:
    """The disk in ``path`` is ``data``, as qemu-img reads it."""
    raw = path.with_name(f"{path.name}.raw")
    raw.write_bytes(data)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)
    raw.unlink()

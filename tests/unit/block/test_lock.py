"""Image locks between processes, QEMU's among them. A second descriptor counts as another process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pileus.block.open import open_image
from pileus.errors import HostError

SIZE = 1 << 20
ALLOWED = {  # (first is readonly, second is readonly) -> both can have it
    (False, False): False,
    (False, True): False,
    (True, False): False,
    (True, True): True,
}
needs_qemu = pytest.mark.skipif(not shutil.which("qemu-io"), reason="no qemu-io (package qemu-utils)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize(("first", "second"), ALLOWED)
def test_one_writer_or_any_readers(path: Path, first: bool, second: bool) -> None:
    with open_image(str(path), readonly=first):
        if ALLOWED[first, second]:
            open_image(str(path), readonly=second).close()
        else:
            with pytest.raises(HostError, match="in use by another process"):
                open_image(str(path), readonly=second)
            open_image(str(path), readonly=True).close() if first else None
    open_image(str(path), readonly=second).close()


def test_another_process_is_refused(path: Path) -> None:
    script = f"from pileus.block.open import open_image; open_image({str(path)!r})"
    with open_image(str(path)):
        done = subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
        )
    assert "in use by another process" in done.stderr
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


@needs_qemu
@pytest.mark.parametrize(("ours", "theirs"), ALLOWED)
def test_qemu_sees_our_locks(path: Path, ours: bool, theirs: bool) -> None:
    """A reader of qemu-io does not mind what others write, so only its writers are refused."""
    command = ["qemu-io", "-f", "raw", *(["-r"] if theirs else []), "-c", "read 0 512", str(path)]
    with open_image(str(path), readonly=ours):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ("lock" not in done.stderr) == theirs, done.stderr


@needs_qemu
@pytest.mark.parametrize(("theirs", "ours"), ALLOWED)
def test_we_see_the_locks_of_qemu(path: Path, theirs: bool, ours: bool) -> None:
    command = ["qemu-io", "-f", "raw", *(["-r"] if theirs else []), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdin
        assert peer.stdout
        peer.stdin.write(b"read 0 512\n")
        peer.stdin.flush()
        while b"read 512" not in peer.stdout.readline():
            pass
        if theirs:
            open_image(str(path), readonly=ours).close()
        else:
            with pytest.raises(HostError, match="in use by another process"):
                open_image(str(path), readonly=ours)
        peer.stdin.write(b"quit\n")
        peer.stdin.close()

"""The examples that boot a guest."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus import VirtualMachine
from pileus.errors import HostError
from tests.guest.guest import ROOT, TRIXIE_PVH
from tests.guest.system import copy_of_root, new_folder, why_not

pytestmark = [pytest.mark.long, pytest.mark.needs("--vsock", "--disk"), pytest.mark.xdist_group("vsock")]
PATIENCE = 400.0  # seconds: a Debian system comes up slowly in an emulated machine
AGENT = "modprobe vmw_vsock_virtio_transport; exec socat VSOCK-LISTEN:1024,fork EXEC:/bin/sh"


@pytest.fixture
def disk() -> Iterator[Path]:
    if reason := why_not():
        pytest.skip(reason)
    folder = new_folder()
    yield copy_of_root(folder)
    shutil.rmtree(folder)


def test_a_command_in_a_guest_over_vsock(disk: Path) -> None:
    words = [str(TRIXIE_PVH.path), str(TRIXIE_PVH.initramfs), str(disk), "cat /etc/debian_version; uname -r"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "guest_command.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    version, release = done.stdout.splitlines()
    assert version.startswith("13")
    assert release == TRIXIE_PVH.release


@pytest.mark.parametrize("in_process", [False, True], ids=["child", "in process"])
def test_a_vm_of_a_program_in_both_directions(disk: Path, in_process: bool) -> None:
    """Sockets to the guest and from it, through a pause; a power off ends it."""
    words = f"""root=/dev/vda rw systemd.run="/bin/sh -c '{AGENT}'" """
    with VirtualMachine(
        kernel=TRIXIE_PVH.path,
        initramfs=TRIXIE_PVH.initramfs,
        disks=[disk],
        cmdline=words,
        in_process=in_process,
    ) as vm:
        with vm.vsock.listen(5000) as listener:
            listener.settimeout(PATIENCE)
            with vm.vsock.connect(1024, timeout=PATIENCE) as shell:
                vm.pause()
                shell.sendall(b"echo from the guest | socat - VSOCK-CONNECT:2:5000; exit\n")
                vm.resume()
                peer, _ = listener.accept()
                with peer:
                    assert peer.makefile().read() == "from the guest\n"
                assert shell.makefile().read() == ""
        with pytest.raises(HostError, match=r"no answer|nothing listens"):
            vm.vsock.connect(4, timeout=1)
        with vm.vsock.connect(1024, timeout=PATIENCE) as shell:
            shell.sendall(b"poweroff -f\n")
            vm.wait(PATIENCE)

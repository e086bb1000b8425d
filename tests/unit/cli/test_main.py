"""The command from its arguments to the VMM, which a stand-in replaces here."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pileus import __version__, log
from pileus.cli.args import scan
from pileus.cli.main import configure, main
from pileus.cli.options import OPTIONS
from pileus.config.model import VmmConfig
from pileus.errors import HostError


class FakeVmm(ModuleType):
    """``pileus.vmm.vmm`` without a VM."""

    def __init__(self) -> None:
        super().__init__("pileus.vmm.vmm")
        self.configs: list[VmmConfig] = []
        self.error: Exception | None = None
        self.serves = False

    def run(self, config: VmmConfig, serve: object = None) -> int:
        self.configs.append(config)
        self.serves = serve is not None
        if self.error is not None:
            raise self.error
        return 42


@pytest.fixture
def vmm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVmm]:
    fake = FakeVmm()
    monkeypatch.setitem(sys.modules, "pileus.vmm.vmm", fake)
    yield fake
    log.level = log.ERROR


def test_a_checked_configuration_reaches_the_vmm(vmm: FakeVmm, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--kernel", "/k", "--cpus", "2", "--cmdline", "quiet", "-vv", "--api-socket", "/s"]) == 42
    vm = vmm.configs[0].vm
    assert vm is not None
    assert (vm.payload.kernel, vm.cpus.boot, vm.cpus.max) == ("/k", 2, 2)
    assert log.level == log.INFO
    out, err = capfd.readouterr()
    assert err == ""
    assert out == (
        "Pileus Guest\n\tAPI server: /s\n\tvCPUs: 2\n\tMemory: 512 MB\n\tKernel: /k\n"
        "\tKernel cmdline: quiet\n\tDisk(s): None\n"
    )


def test_the_summary_names_each_disk_by_its_image_or_its_socket(
    vmm: FakeVmm, capfd: pytest.CaptureFixture[str]
) -> None:
    disks = ["path=/a", "path=/b\n,readonly=on", "vhost_user=on,socket=/s"]
    shared = ["--memory", "size=512M,shared=on"]
    assert main(["--kernel", "/k", *shared, "--disk", *disks, "--vhost-user-blk", "sock=/t"]) == 42
    assert "\tDisk(s): /a, /b\\n, /s, /t\n" in capfd.readouterr().out


def test_without_a_kernel_there_is_no_vm(vmm: FakeVmm, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--memory", "1G", "--api-socket", "fd=7"]) == 42
    assert vmm.configs[0].vm is None
    assert "\tAPI server: fd 7\n\tvCPUs: 1\n\tMemory: 1024 MB\n\tKernel: None\n" in capfd.readouterr().out


def test_an_api_is_served_where_it_is_asked_for_or_nothing_else_could_be_done(vmm: FakeVmm) -> None:
    main(["--kernel", "/k"])
    assert (vmm.serves, vmm.configs[-1].api_socket) == (False, None)
    main(["--kernel", "/k", "--api-socket"])
    assert vmm.serves
    main([])
    assert vmm.serves
    assert vmm.configs[-1].api_socket is not None
    assert vmm.configs[-1].api_socket.where.endswith(f"/pileus.{os.getpid()}")


def test_options_are_checked_even_without_a_kernel(vmm: FakeVmm, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--cpus", "boot=2,max=1"]) == 1
    assert capfd.readouterr().err == "pileus: --cpus boot=2,max=1: boot may be at most max\n"
    assert vmm.configs == []


def test_serial_on_the_terminal_needs_no_word_about_the_console() -> None:
    config = configure(scan(["--kernel", "/k", "--serial", "tty"], OPTIONS))
    assert config.vm is not None
    assert config.vm.console.mode == "off"


def test_an_error_of_the_vmm_is_one_line(vmm: FakeVmm, capfd: pytest.CaptureFixture[str]) -> None:
    vmm.error = HostError("open", "/dev/kvm\n\x1b[2J", FileNotFoundError(2, ""))
    assert main(["--kernel", "/k"]) == 1
    assert capfd.readouterr().err == "pileus: cannot open /dev/kvm\\n\\x1b[2J: No such file or directory\n"


def test_bytes_that_are_no_utf8_are_shown(vmm: FakeVmm, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--kernel", "/k\udcff"]) == 42
    assert "\tKernel: /k\\udcff\n" in capfd.readouterr().out


def test_a_bug_is_not_dressed_as_an_error(vmm: FakeVmm) -> None:
    vmm.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["--kernel", "/k"])


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capfd.readouterr().out == f"pileus {__version__}\n"


def test_the_other_command_has_the_version_that_its_callers_look_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["--version"], face="cloud-hypervisor") == 0
    assert re.fullmatch(r"cloud-hypervisor v(\d+)\.\d+\.\d+\n", capfd.readouterr().out)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--kernel", "/k", flag]) == 0
    assert capfd.readouterr().out.startswith(f"pileus {__version__}: a virtual machine monitor for KVM\n")


def test_a_log_file_that_cannot_be_made(
    vmm: FakeVmm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "log"
    assert main(["--log-file", str(path)]) == 1
    allowed = "a file that can be written is needed: No such file or directory"
    assert capfd.readouterr().err == f"pileus: --log-file {path}: {allowed}\n"


def test_nobody_reading_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-m", "pileus.cli.main", "--help"], stdout=write_end, check=False)
    os.close(write_end)
    assert done.returncode == 0

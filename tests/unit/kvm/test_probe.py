"""A host that cannot run stock kernels is told so, before anything is made."""

import os
from pathlib import Path

import pytest

from pileus.errors import HostError
from pileus.kvm.probe import OVERRIDE, check_host

VT = "processor\t: 0\nflags\t\t: fpu vme {} sse2\n"


class Host:
    """Files as a host might have them."""

    def __init__(self, folder: Path) -> None:
        self.device, self.cpuinfo, self.modules = folder / "kvm", folder / "cpuinfo", folder / "module"
        self.device.touch()
        self.cpuinfo.write_text(VT.format("sse"))
        (self.modules / "kvm").mkdir(parents=True)

    def check(self) -> None:
        check_host(str(self.device), str(self.cpuinfo), str(self.modules))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.delenv(OVERRIDE, raising=False)
    return Host(tmp_path)


def test_a_host_with_its_own_kvm_passes(host: Host) -> None:
    host.check()


def test_a_missing_device_names_the_way_out(host: Host) -> None:
    host.device.unlink()
    with pytest.raises(HostError, match=r"no KVM .*scripts/nested"):
        host.check()


def test_a_device_of_another_group_names_what_to_join(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(HostError, match=r"cannot open .*/kvm: permission denied; join the group"):
        host.check()


def test_a_flag_must_be_a_whole_word(host: Host) -> None:
    (host.modules / "kvm_pvm").mkdir()
    host.cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu svm_lock vmxoff\nbugs\t\t: svm\n")
    with pytest.raises(HostError, match="kvm_pvm"):
        host.check()


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_pvm_beside_real_virtualization_passes(host: Host, flag: str) -> None:
    (host.modules / "kvm_pvm").mkdir()
    host.cpuinfo.write_text(VT.format(flag))
    host.check()


def test_pvm_alone_is_refused_unless_overridden(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (host.modules / "kvm_pvm").mkdir()
    with pytest.raises(HostError, match=r"kvm_pvm without vmx or svm .*scripts/nested"):
        host.check()
    monkeypatch.setenv(OVERRIDE, "1")
    host.check()


def test_a_device_that_is_not_ours_names_its_group(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(HostError, match="permission denied; join the group"):
        host.check()


@pytest.mark.parametrize("value", ["", "0", "yes"])
def test_the_override_is_1_and_nothing_else(host: Host, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (host.modules / "kvm_pvm").mkdir()
    monkeypatch.setenv(OVERRIDE, value)
    with pytest.raises(HostError, match="kvm_pvm"):
        host.check()

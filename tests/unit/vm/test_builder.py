"""A VM is built whole, or nothing of it is left."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.config.model import (
    CpusConfig,
    DeviceConfig,
    DiskConfig,
    FsConfig,
    NetConfig,
    UserDeviceConfig,
    VhostUserBlkConfig,
    VmConfig,
    VsockConfig,
)
from pileus.console import Console, open_console
from pileus.errors import ConfigError, HostError, KvmError
from pileus.kvm import Kvm
from pileus.vfio_user import client
from pileus.vfio_user.devices.copy_engine import CopyEngine
from pileus.vfio_user.server import Server
from pileus.vhost_user.devices.fs import VhostUserFs
from pileus.virtio.devices.iommu import IommuDevice
from pileus.vm.builder import build, is_split, topology_of
from pileus.vm.vcpu import Event
from pileus.vmm.loop import Loop, Timer
from tests.unit import tiny
from tests.unit.vhost_user.fake_backend import FakeBackend


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    return tiny.config(tmp_path, tiny.POWER_OFF, cpus=2)


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    console = open_console("file", str(tmp_path / "serial"), name="serial", warn=print, quit=print)
    loop = Loop()
    console.start(loop)
    yield console
    console.close()
    loop.close()


def ignore(event: Event) -> None:
    pass


def ignore_call() -> None:
    pass


class Idle:
    """A control loop that serves nothing."""

    def watch(self, fd: int, events: int, call: object) -> None:
        pass

    def unwatch(self, fd: int) -> None:
        pass

    def after(self, seconds: float, call: object) -> Timer:
        return Timer(0, ignore_call)

    def post(self, call: object) -> None:
        pass


IDLE = Idle()


class FailsAt:
    """Stands for ``real``, but its ``nth`` call, or that of what it makes, fails."""

    def __init__(self, real: Any, nth: int, calls: list[str] | None = None) -> None:
        self._real = real
        self._nth = nth
        self.calls = [] if calls is None else calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if not callable(found) or name == "close":
            return found

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self._nth:
                raise KvmError(name, 5, "injected")
            made = found(*args)
            return FailsAt(made, self._nth, self.calls) if name.startswith("create_") and made else made

        return call


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_each_step_that_fails_gives_everything_back(
    kvm: Kvm, config: VmConfig, console: Console, irqchip: str
) -> None:
    """Until a build meets no failure any more."""
    config.irqchip = irqchip
    build(config, kvm, console, ignore, IDLE).close()
    before = tiny.held()
    for nth in range(1, 100):
        failing = FailsAt(kvm, nth)
        try:
            build(config, failing, console, ignore, IDLE).close()  # type: ignore[arg-type]
        except KvmError:
            assert tiny.held() == before, f"after {failing.calls}"
        else:
            break
    controllers = {"kernel": "create_irqchip", "split": "split_irqchip"}[irqchip]
    assert {"create_vm", "set_memory", controllers, "add_irqfd", "create_vcpu", "set_cpuid"} <= set(
        failing.calls
    )
    assert tiny.held() == before


@pytest.mark.parametrize("field", ["kernel", "initramfs"])
def test_a_payload_that_is_missing_gives_everything_back(
    kvm: Kvm, config: VmConfig, console: Console, field: str
) -> None:
    before = tiny.held()
    setattr(config.payload, field, "/no/such/file")
    with pytest.raises(ConfigError, match=f"--{field} /no/such/file"):
        build(config, kvm, console, ignore, IDLE)
    assert tiny.held() == before


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_a_hundred_vms_leave_nothing(kvm: Kvm, config: VmConfig, console: Console, irqchip: str) -> None:
    config.irqchip = irqchip
    for _ in range(50):  # until Python's allocator has settled, whose steps are a MiB
        build(config, kvm, console, ignore, IDLE).close()
    before = tiny.held()
    for _ in range(100):
        build(config, kvm, console, ignore, IDLE).close()
    assert tiny.held() == before


def test_a_vm_with_sockets_is_built_again_after_it_was_closed(
    kvm: Kvm, config: VmConfig, tmp_path: Path
) -> None:
    path = tmp_path / "vsock"
    config.vsock = VsockConfig(cid=3, socket=str(path))

    def build_and_close() -> None:
        vm = build(config, kvm, None, ignore, IDLE)
        assert path.is_socket()
        with pytest.raises(HostError, match=r"vsock: another process does$"):
            build(config, kvm, None, ignore, IDLE)
        vm.close()
        assert not path.exists()

    build_and_close()
    before = tiny.held()
    for _ in range(30):
        build_and_close()
    after = tiny.held()
    assert (after.files, after.threads) == (before.files, before.threads)


def test_a_vm_can_be_closed_twice_and_without_having_run(kvm: Kvm, config: VmConfig) -> None:
    vm = build(config, kvm, None, ignore, IDLE)
    assert vm.memory.ranges == [(0, 16 << 20)]
    assert vm.exits == {}
    vm.close()
    vm.close()


def test_devices_behind_the_iommu_are_built_again_and_again(
    kvm: Kvm, config: VmConfig, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    config.disks = [DiskConfig(path=str(image), iommu=True), DiskConfig(path=str(image))]
    config.disks[0].readonly = config.disks[1].readonly = True

    def build_and_close() -> None:
        vm = build(config, kvm, None, ignore, IDLE)
        iommu = next(device for device in vm.devices if isinstance(device, IommuDevice))
        assert list(iommu.core.endpoints) == [1 << 3]  # the first disk's slot, the only one that asked
        vm.close()

    build_and_close()
    before = tiny.held()
    for _ in range(10):
        build_and_close()
    after = tiny.held()
    assert (after.files, after.threads) == (before.files, before.threads)


def test_a_back_end_is_given_the_guest_s_memory(kvm: Kvm, config: VmConfig, tmp_path: Path) -> None:
    """And so it is shared, without being asked for."""
    before = os.listdir("/proc/self/fd")
    blk, net, fs = (FakeBackend(tmp_path / name) for name in ("blk", "net", "fs"))
    config.vhost_user_blk = [VhostUserBlkConfig(sock=blk.path, num_queues=2)]
    config.net = [NetConfig(vhost_user=True, socket=net.path)]
    config.fs = [FsConfig(tag="shared", sock=fs.path)]
    loop = Loop()
    vm = build(config, kvm, None, ignore, loop)
    assert all(region.fd >= 0 for _, region in vm.memory.regions)
    vm.close()
    loop.close()
    for backend in (blk, net, fs):
        backend.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_back_end_that_is_not_there_is_told_of(
    kvm: Kvm, config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = VhostUserFs.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "patience", 0)
    before = tiny.held()
    config.fs = [FsConfig(tag="shared", sock=str(tmp_path / "nobody"))]
    with pytest.raises(ConfigError, match=r"--fs .*nobody: no back-end is there"):
        build(config, kvm, None, ignore, IDLE)
    assert tiny.held() == before


def test_devices_of_other_processes_are_on_the_bus(kvm: Kvm, config: VmConfig, tmp_path: Path) -> None:
    """Twice, as after a reboot; the device is another process's, and outlives both VMs."""
    before = os.listdir("/proc/self/fd")
    path = str(tmp_path / "socket")
    engine, server = CopyEngine(), Server(path)

    def serve() -> None:
        for _ in range(2):
            server.serve_one(engine)

    thread = threading.Thread(target=serve)
    thread.start()
    config.user_devices = [UserDeviceConfig(socket=path)]
    loop = Loop()
    for _ in range(2):
        vm = build(config, kvm, None, ignore, loop)
        assert engine.dma.windows == [(gpa, region.size) for gpa, region in vm.memory.regions]
        vm.memory.write(0x300000, b"seen by the device")
        assert engine.dma.read(0x300000, 18) == b"seen by the device"
        vm.close()
    thread.join()
    loop.close()
    server.close()
    engine.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_device_whose_server_is_not_there_is_told_of(
    kvm: Kvm, config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.connect, "__defaults__", (0.0,))
    before = tiny.held()
    config.user_devices = [UserDeviceConfig(socket=str(tmp_path / "nobody"))]
    with pytest.raises(ConfigError, match=r"--user-device .*nobody: no server is there"):
        build(config, kvm, None, ignore, IDLE)
    assert tiny.held() == before


@pytest.mark.skipif(not os.path.exists("/dev/vfio/vfio"), reason="no VFIO on this host")
def test_a_device_of_the_host_that_is_none_is_told_of(kvm: Kvm, config: VmConfig, tmp_path: Path) -> None:
    before = tiny.held()
    config.devices = [DeviceConfig(path=str(tmp_path))]
    with pytest.raises(ConfigError, match=r"--device .*: it is no PCI device behind an IOMMU"):
        build(config, kvm, None, ignore, IDLE)
    assert tiny.held() == before


def test_two_vms_are_built_side_by_side(kvm: Kvm, config: VmConfig) -> None:
    first, second = build(config, kvm, None, ignore, IDLE), build(config, kvm, None, ignore, IDLE)
    first.memory.write(0x300000, b"first")
    assert second.memory.read(0x300000, 5) == bytes(5)
    first.close()
    second.memory.write(0x300000, b"second")
    second.close()


def test_without_a_topology_each_vcpu_is_a_core(kvm: Kvm) -> None:
    topology = topology_of(CpusConfig(boot=3), kvm)
    assert (topology.threads, topology.cores, topology.dies, topology.packages) == (1, 3, 1, 1)


def test_the_topology_asked_for_is_made(kvm: Kvm) -> None:
    topology = topology_of(CpusConfig(boot=2, max=8, topology=(2, 2, 1, 2)), kvm)
    assert (topology.threads, topology.cores, topology.dies, topology.packages) == (2, 2, 1, 2)


class Irqchips:
    """A KVM and what it has for interrupts."""

    def __init__(self, *, split: bool = True, deadline: bool = True) -> None:
        self.has_split_irqchip = split
        self.has_tsc_deadline = deadline


@pytest.mark.parametrize(
    ("irqchip", "long_apic_ids", "split"),
    [
        (None, False, False),
        (None, True, True),
        ("kernel", False, False),
        ("split", False, True),
        ("split", True, True),
    ],
)
def test_the_ioapic_is_kvm_s_unless_asked_or_needed(
    irqchip: str | None, long_apic_ids: bool, split: bool
) -> None:
    assert is_split(irqchip, Irqchips(), long_apic_ids) is split  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("irqchip", "kvm", "long_apic_ids", "sentence"),
    [
        ("kernel", Irqchips(), True, "--irqchip kernel: APIC ids above 254 need split"),
        ("split", Irqchips(split=False), False, "--irqchip split: this host's KVM has no split irqchip"),
        (None, Irqchips(deadline=False), True, "--irqchip split: this host's KVM has no TSC deadline timer"),
    ],
)
def test_an_irqchip_that_cannot_be_is_refused(
    irqchip: str | None, kvm: Irqchips, long_apic_ids: bool, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        is_split(irqchip, kvm, long_apic_ids)  # type: ignore[arg-type]


class Small:
    """A KVM with room for few vCPUs."""

    max_vcpus = 8
    max_vcpu_id = 10


@pytest.mark.parametrize(
    ("cpus", "sentence"),
    [
        (CpusConfig(boot=9), "--cpus 9: at most 8 vCPUs are possible on this host"),
        (CpusConfig(boot=2, max=9), "--cpus 9: at most 8 vCPUs are possible on this host"),
        (CpusConfig(boot=1, max=6, topology=(3, 1, 1, 2)), None),
        (CpusConfig(boot=1, max=6, topology=(1, 1, 3, 2)), None),
        (CpusConfig(boot=1, max=7, topology=(1, 1, 1, 7)), None),
    ],
)
def test_what_kvm_has_no_room_for_is_refused(cpus: CpusConfig, sentence: str | None) -> None:
    if sentence is None:
        topology_of(cpus, Small())  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=sentence):
        topology_of(cpus, Small())  # type: ignore[arg-type]


def test_apic_ids_beyond_kvms_last_are_refused() -> None:
    """Two packages of five cores: the second package's ids begin at 8, its last core has 12."""
    small = Small()
    small.max_vcpus = 10
    with pytest.raises(ConfigError, match=r"--cpus topology \(1, 5, 1, 2\): its APIC ids pass 9, KVM's last"):
        topology_of(CpusConfig(boot=10, topology=(1, 5, 1, 2)), small)  # type: ignore[arg-type]

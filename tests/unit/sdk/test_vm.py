"""VMs of programs, with kernels of a few bytes: in a child process and inside this one."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pileus
from pileus.errors import ApiError, ConfigError, HostError, StateError
from pileus.kvm.probe import OVERRIDE
from pileus.sdk import vm as module
from pileus.sdk.vm import VirtualMachine
from pileus.virtio.devices.rng import Rng
from pileus.vmm import vmm as vmm_module
from tests.unit import tiny

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")
WAIT_FOR_BUTTON = bytes.fromhex("66ba0605 ec a801 74fb")  # in al, 0x506; test al, 1; jz to the in
PATIENCE = 30
NewVm = Callable[..., VirtualMachine]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where VMs put their files; nothing is left there."""
    monkeypatch.setenv(OVERRIDE, "1")
    home = tmp_path / "t"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setattr(module, "SHORT", 200)
    return home


@pytest.fixture(params=[False, True], ids=["child", "in process"])
def new(request: pytest.FixtureRequest, tmp_path: Path, home: Path) -> NewVm:
    def new(code: bytes = tiny.SPIN, **words: Any) -> VirtualMachine:
        (tmp_path / "kernel").write_bytes(tiny.elf(code))
        given = {"kernel": tmp_path / "kernel", "memory": "16M", "in_process": request.param} | words
        return VirtualMachine(**given)

    return new


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def left(home: Path) -> list[object]:
    return [*home.iterdir(), *children()]


def test_a_life_in_a_block(new: NewVm, home: Path) -> None:
    before = tiny.held()[:2]
    with new(cpus=2) as vm:
        assert vm.state == "Running"
        vm.pause()
        assert vm.state == "Paused"
        vm.resume()
        vm.reboot()
        assert vm.counters()["_vsock0"]["rx_bytes"] == 0
        vm.nmi()
        vm.shutdown()
        vm.wait()
        assert vm.state == "Shutdown"
        vm.boot()
        assert vm.info.config["cpus"]["boot_vcpus"] == 2
        assert len(list(home.iterdir())) == 1
    assert left(home) == []
    assert tiny.held()[:2] == before


def test_a_child_is_another_process_and_its_vm_not_ours(new: NewVm) -> None:
    with new() as vm:
        pid = vm.client.ping().pid
        names = tiny.thread_names()
        if pid == os.getpid():
            assert {"vmm", "http-server", "vcpu0"} <= set(names)
        else:
            assert children() == [str(pid)]
            assert not any(name.startswith("vcpu") for name in names)
            assert os.getpgid(pid) == pid, "a Ctrl-C on our terminal is not for it"


def test_wait_returns_when_the_guest_is_off(new: NewVm, tmp_path: Path) -> None:
    with new(tiny.SAY_A + tiny.POWER_OFF, serial={"file": tmp_path / "out"}) as vm:
        vm.wait(PATIENCE)
        assert vm.state == "Shutdown"
        assert (tmp_path / "out").read_bytes() == b"A"
        vm.wait()


def test_wait_is_not_fooled_by_a_reboot(new: NewVm, tmp_path: Path) -> None:
    (tmp_path / "ram").touch()
    code = tiny.power_off_on_boot(4, tiny.ACPI_RESET)
    with new(code, memory={"size": "16M", "file": tmp_path / "ram"}) as vm:
        vm.wait(PATIENCE)
    assert (tmp_path / "ram").read_bytes()[tiny.COUNTER] == 4


def test_the_power_button_asks(new: NewVm) -> None:
    with new(WAIT_FOR_BUTTON + tiny.POWER_OFF) as vm:
        with pytest.raises(TimeoutError, match=r"the VM still runs after 0\.1 s"):
            vm.wait(0.1)
        vm.power_button()
        vm.wait(PATIENCE)


def test_more_events_than_there_is_room_for_do_not_hide_the_end(new: NewVm) -> None:
    with new() as vm:
        fcntl.fcntl(vm._events_fd, fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(15):
            vm.pause()
            vm.resume()
        vm.shutdown()
        vm.wait(PATIENCE)


def test_an_exception_leaves_nothing(new: NewVm, home: Path) -> None:
    before = tiny.held()[:2]
    with pytest.raises(ZeroDivisionError), new():
        raise ZeroDivisionError
    assert left(home) == []
    assert tiny.held()[:2] == before


def test_a_kernel_that_is_none_is_told_and_leaves_nothing(new: NewVm, home: Path, tmp_path: Path) -> None:
    before = tiny.held()[:2]
    vm = new()
    (tmp_path / "kernel").write_bytes(b"hello")
    with pytest.raises(ApiError, match=f"--kernel {tmp_path}/kernel"):
        vm.start()
    assert left(home) == []
    assert tiny.held()[:2] == before


def test_values_that_make_no_vm_are_told_before_anything_is_made(new: NewVm, home: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpus\.boot 0: it takes"):
        new(cpus=0)
    with pytest.raises(ConfigError, match="kernel is missing"):
        new(kernel=None)
    with pytest.raises(ConfigError, match="color is unknown"):
        new(color="red")
    assert left(home) == []


def test_a_host_that_cannot_is_told(new: NewVm, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise HostError("use", "/dev/kvm", "no")

    monkeypatch.setattr(module, "check_host", refuse)
    with pytest.raises(HostError, match="cannot use /dev/kvm: no"), new():
        pass
    assert left(home) == []


def test_a_vmm_that_cannot_begin_is_told(new: NewVm, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child that is its interpreter, which is no more."""

    def refuse() -> None:
        raise HostError("make", "a VMM", "no")

    before = tiny.held()[:2]
    monkeypatch.setattr(vmm_module, "check_host", refuse)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(HostError, match=r"cannot start the VM: cannot make a VMM: no|cannot start /nowhere"):
        new().start()
    assert left(home) == []
    assert tiny.held()[:2] == before


def test_nothing_can_be_asked_of_one_that_is_not_started(new: NewVm) -> None:
    vm = new()
    with pytest.raises(StateError, match="not started: use it in a with statement"):
        vm.pause()
    with pytest.raises(StateError, match="it has to be started"):
        _ = vm.vsock
    with vm, pytest.raises(StateError, match="it can be once"):
        vm.start()
    vm.close()
    with pytest.raises(StateError, match="not started"):
        vm.pause()


def test_a_vm_can_wait_for_its_boot(new: NewVm) -> None:
    with new(boot=False) as vm:
        assert vm.state == "Created"
        vm.wait()
        with vm.vsock.listen(5000) as listener:
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        vm.vsock.listen(5000).close()
        vm.boot()


def test_a_port_where_nobody_listens_is_told(new: NewVm) -> None:
    with new() as vm, pytest.raises(HostError, match=r"port 1024 of the guest .*: no answer in 0\.2 s"):
        vm.vsock.connect(1024, timeout=0.2)


def test_a_vm_without_vsock_has_no_ports(new: NewVm) -> None:
    with new(vsock=False) as vm, pytest.raises(StateError, match="it was made without"):
        vm.vsock.connect(1)


def test_files_of_ports_go_with_the_vm_wherever_its_socket_is(new: NewVm, tmp_path: Path) -> None:
    with new(vsock={"cid": 9, "socket": tmp_path / "vsock"}) as vm:
        listener = vm.vsock.listen(7)
        assert (tmp_path / "vsock_7").exists()
    listener.close()
    assert not (tmp_path / "vsock_7").exists()
    assert not (tmp_path / "vsock").exists()


def test_a_vm_that_was_deleted_is_off(new: NewVm) -> None:
    with new() as vm:
        vm.client.delete()
        vm.wait()


def test_a_vmm_that_was_ended_is_told(new: NewVm, home: Path) -> None:
    with new() as vm:
        vm.client.shutdown_vmm()
        host = vm._host
        assert host is not None
        tiny.wait_until(lambda: not host.is_alive)
        with pytest.raises(HostError, match="pileus ended"):
            vm.wait(PATIENCE)
    assert left(home) == []


def test_two_live_at_once(new: NewVm, home: Path) -> None:
    with new() as one, new() as other:
        one.shutdown()
        assert (one.state, other.state) == ("Shutdown", "Running")
    assert left(home) == []


def test_one_that_nobody_closed_goes_with_its_last_reference(new: NewVm, home: Path) -> None:
    vm = new()
    vm.start()
    del vm
    gc.collect()
    assert left(home) == []


def test_many_one_after_the_other_leave_nothing(new: NewVm, home: Path) -> None:
    held = []
    for count in range(12):
        with new(tiny.POWER_OFF) as vm:
            vm.wait(PATIENCE)
        if count >= 5:
            held.append(tiny.held()[:2])
    assert len(set(held)) == 1
    assert left(home) == []


def test_a_child_of_a_program_that_was_killed_ends_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    (tmp_path / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    script = f"""
import time
from pileus import VirtualMachine
vm = VirtualMachine(kernel={str(tmp_path / "kernel")!r}, memory="16M")
vm.start()
print(vm.client.ping().pid, flush=True)
time.sleep(60)
"""
    program = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(home)},
        text=True,
    )
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    program.send_signal(signal.SIGKILL)
    program.wait()
    program.stdout.close()
    tiny.wait_until(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid))
    tiny.wait_until(lambda: list(home.iterdir()) == [])


def test_a_fork_of_the_program_that_ends_leaves_the_vm_alone(tmp_path: Path, home: Path) -> None:
    (tmp_path / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    script = f"""
import os, sys
from pileus import VirtualMachine
with VirtualMachine(kernel={str(tmp_path / "kernel")!r}, memory="16M") as vm:
    fork = os.fork()
    if fork == 0:
        sys.exit(0)
    os.waitpid(fork, 0)
    print(vm.state)
"""
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(home)},
        check=True,
        timeout=60,
    )
    assert told.stdout == "Running\n"
    assert left(home) == []


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def interrupt(vm: VirtualMachine) -> None:
    with vm:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)


def test_an_interrupt_is_for_the_program_and_not_for_its_vm(tmp_path: Path, home: Path) -> None:
    (tmp_path / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    for _ in range(5):
        vm = VirtualMachine(kernel=tmp_path / "kernel", memory="16M", in_process=True)
        with pytest.raises(KeyboardInterrupt):
            interrupt(vm)
        with pytest.raises(StateError):
            vm.pause()
    assert left(home) == []


def test_a_device_of_the_program_is_part_of_its_vm(tmp_path: Path, home: Path) -> None:
    (tmp_path / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    made: list[Rng] = []

    class Counting(Rng):
        def counters(self) -> dict[str, int]:
            return {"seen": 42}

    def make() -> Rng:
        made.append(Counting("mine"))
        return made[-1]

    words: dict[str, Any] = {"kernel": tmp_path / "kernel", "memory": "16M", "devices": [make]}
    with VirtualMachine(**words, in_process=True) as vm:
        assert vm.counters()["mine"] == {"seen": 42}
        vm.reboot()
        assert len(made) == 2
    with pytest.raises(ConfigError, match="a child process has none of our objects"):
        VirtualMachine(**words)


def test_the_package_has_the_name() -> None:
    assert pileus.VirtualMachine is VirtualMachine

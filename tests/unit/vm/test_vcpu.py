"""What a vCPU's thread makes of the ways in which the guest leaves it."""

import _thread
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pileus.devices.i8042 import I8042
from pileus.kvm import Kvm
from pileus.kvm._vcpu import (
    DEVICE_FAILED,
    EVENT_CRASH,
    EVENT_RESET,
    EVENT_SHUTDOWN,
    FAILED_ENTRY,
    HALTED,
    INTERNAL_ERROR,
    SYSTEM_EVENT,
    TRIPLE_FAULT,
    UNKNOWN_EXIT,
)
from pileus.vm.builder import build
from pileus.vm.vcpu import CRASH, FAILURE, FAULT, POWER_OFF, RESET, Event, explain
from pileus.vm.vm import Vm
from pileus.vmm.loop import Loop
from tests.unit import tiny

PATIENCE = 20  # seconds

EXITS: list[tuple[str, Any, str, str]] = [
    (TRIPLE_FAULT, None, FAULT, "vCPU 1 at RIP 0x10"),
    (SYSTEM_EVENT, (EVENT_SHUTDOWN, 0), POWER_OFF, "vCPU 1 at RIP 0x10 asked for it"),
    (SYSTEM_EVENT, (EVENT_RESET, 0), RESET, "vCPU 1 at RIP 0x10 asked for it"),
    (SYSTEM_EVENT, (EVENT_CRASH, 0), CRASH, "vCPU 1 at RIP 0x10 asked for it"),
    (SYSTEM_EVENT, (99, 7), FAILURE, "vCPU 1 at RIP 0x10 stopped: system event (0x63, 0x7)"),
    (INTERNAL_ERROR, (1, 0xF4), FAILURE, "vCPU 1 at RIP 0x10 stopped: internal error (0x1, 0xf4)"),
    (FAILED_ENTRY, 33, FAILURE, "vCPU 1 at RIP 0x10 stopped: failed entry (33)"),
    (UNKNOWN_EXIT, 77, FAILURE, "vCPU 1 at RIP 0x10 stopped: unknown exit (77)"),
    (HALTED, None, FAILURE, "vCPU 1 at RIP 0x10 stopped: halted"),
]


@pytest.mark.parametrize(("reason", "detail", "kind", "text"), EXITS)
def test_an_exit_is_put_into_words(reason: str, detail: Any, kind: str, text: str) -> None:
    event = explain(1, "0x10", reason, detail)
    assert (event.kind, event.text, event.error) == (kind, text, None)


def test_the_exception_of_a_device_stays_whole() -> None:
    error = ZeroDivisionError()
    event = explain(0, "0x10", DEVICE_FAILED, error)
    assert (event.kind, event.error) == (FAILURE, error)
    assert event.text == "vCPU 0 at RIP 0x10 touched a device that failed"


Run = Callable[..., "tuple[Vm, queue.Queue[Event]]"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a VM with some code; its events come into the queue."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
    vms: list[Vm] = []

    def start(code: bytes, cpus: int = 1, affinity: dict[int, list[int]] | None = None) -> Any:
        events: queue.Queue[Event] = queue.Queue()
        config = tiny.config(tmp_path, code, cpus=cpus)
        config.cpus.affinity = affinity
        vms.append(build(config, kvm, None, events.put, loop))
        vms[-1].start()
        return vms[-1], events

    loop = Loop()
    with Kvm() as kvm:
        yield start
        for vm in vms:
            vm.close()
    loop.close()


POWER_REQUESTS = {
    "power off": (tiny.POWER_OFF, POWER_OFF, "by ACPI"),
    "reset": (tiny.ACPI_RESET, RESET, "by ACPI"),
    "i8042 reset": (tiny.I8042_RESET, RESET, "by the i8042"),
    "panic": (tiny.PANIC + tiny.SPIN, CRASH, "to pvpanic"),
    "panic with a crash kernel": (
        bytes.fromhex("66ba0505 b002 ee ebfe"),
        CRASH,
        "to pvpanic and dumps itself",
    ),
    "pvpanic shutdown": (bytes.fromhex("66ba0505 b004 ee ebfe"), POWER_OFF, "by pvpanic"),
}


@pytest.mark.parametrize(("code", "kind", "text"), POWER_REQUESTS.values(), ids=POWER_REQUESTS)
def test_what_the_guest_asks_of_the_vm_is_an_event(run: Run, code: bytes, kind: str, text: str) -> None:
    _, events = run(code)
    event = events.get(timeout=PATIENCE)
    assert (event.kind, event.text) == (kind, text)


def test_a_device_that_raises_is_a_failure_with_its_exception(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> int:
        raise ZeroDivisionError("of the device")

    monkeypatch.setattr(I8042, "read", broken)
    _, events = run(tiny.READ_I8042)
    event = events.get(timeout=PATIENCE)
    assert event.kind == FAILURE
    assert event.text.startswith("vCPU 0 at RIP 0x10000")
    assert isinstance(event.error, ZeroDivisionError)


def test_what_kvm_cannot_go_on_from_is_a_failure(run: Run) -> None:
    _, events = run(tiny.ENTER_A_HOLE)
    event = events.get(timeout=PATIENCE)
    assert (event.kind, event.error) == (FAILURE, None)
    assert "internal error (0x1" in event.text


def test_a_host_cpu_that_is_not_there_is_named(run: Run) -> None:
    _, events = run(tiny.SPIN, affinity={0: [8191]})
    event = events.get(timeout=PATIENCE)
    assert event.kind == FAILURE
    assert event.text == "--cpus affinity 0@[8191]: this process may use no such host CPU"


def test_a_vcpu_keeps_to_its_host_cpus_and_nobody_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []
    before = os.sched_getaffinity(0)
    cpu = min(before)

    def look(*_: int) -> int:
        asked.append(os.sched_getaffinity(0))  # on the vCPU's thread
        return 0

    monkeypatch.setattr(I8042, "read", look)
    _, events = run(tiny.READ_I8042 + tiny.POWER_OFF, affinity={0: [cpu]})
    events.get(timeout=PATIENCE)
    assert asked == [{cpu}]
    assert os.sched_getaffinity(0) == before


def test_vcpus_that_wait_to_be_woken_can_be_stopped(run: Run) -> None:
    vm, events = run(tiny.PANIC + tiny.SPIN, cpus=4)
    assert events.get(timeout=PATIENCE).kind == CRASH
    tiny.wait_until(lambda: {"vcpu0", "vcpu1", "vcpu2", "vcpu3"} <= set(tiny.thread_names()))
    vm.stop()
    vm.stop()
    assert vm.exits[2] == 1  # KVM_EXIT_IO: the write to pvpanic
    assert "port I/O: 1 exits" in vm.usage()
    assert any(line.startswith("ports 0x505, PvPanic: 1 accesses") for line in vm.usage())


def test_vcpus_that_park_are_outside_and_go_on_or_end(run: Run) -> None:
    vm, _ = run(tiny.COUNT + tiny.SPIN_BACK, cpus=2)

    def counts() -> bool:
        before = vm.memory.read(tiny.COUNTER, 1)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            if vm.memory.read(tiny.COUNTER, 1) != before:
                return True
        return False

    tiny.wait_until(counts)
    for _ in range(20):
        vm.pause()
        vm.resume()
    tiny.wait_until(counts)
    vm.pause()
    assert not counts()
    vm.stop()
    vm.stop()


def test_a_vcpu_that_has_ended_can_be_parked(run: Run) -> None:
    vm, events = run(tiny.ENTER_A_HOLE)
    events.get(timeout=PATIENCE)
    vm.threads[0].join()
    vm.pause()
    vm.resume()


def test_a_vcpu_that_has_ended_can_be_stopped(run: Run) -> None:
    vm, events = run(tiny.ENTER_A_HOLE)
    events.get(timeout=PATIENCE)
    vm.threads[0].join()
    vm.stop()


def test_other_threads_keep_their_stack_size(run: Run) -> None:
    before = threading.stack_size()
    run(tiny.POWER_OFF)
    assert threading.stack_size() == before


def test_a_thread_that_cannot_start_leaves_the_others_to_close(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, calls = _thread.start_new_thread, 0

    def second_fails(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("can't start new thread")
        return start(*args)

    monkeypatch.setattr(_thread, "start_new_thread", second_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        run(tiny.SPIN, cpus=3)

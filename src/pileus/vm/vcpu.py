"""A vCPU's thread: from the first KVM_RUN until the VM stops."""

import _thread
import os
from errno import EFAULT

from pileus import log
from pileus.errors import ConfigError, KvmError, PileusError
from pileus.kvm._vcpu import (
    DEVICE_FAILED,
    EVENT_CRASH,
    EVENT_RESET,
    EVENT_SHUTDOWN,
    IOAPIC_EOI,
    KICKED,
    SYSTEM_EVENT,
    TRIPLE_FAULT,
    name_thread,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pileus.bus import Bus
    from pileus.kvm import Vcpu

RESET_RIP = "0xfff0"  # KVM on AMD resets a vCPU that shut down, so that this tells nothing
STACK_SIZE = 256 << 10  # bytes: the deepest path is a Python device

GONE = "; memory it touched is gone: is a file of --pmem or --memory cut short, or its file system full?"

# What a guest did, as the control loop hears of it.
POWER_OFF, RESET, FAULT, CRASH, FAILURE = "power off", "reset", "triple fault", "crash", "failure"


class Event:
    """``kind`` of the constants above; ``text`` says more in one clause; ``error`` is a bug of ours."""

    __slots__ = ("error", "kind", "text")

    def __init__(self, kind: str, text: str, error: BaseException | None = None) -> None:
        self.kind = kind
        self.text = text
        self.error = error


SYSTEM_EVENTS = {EVENT_SHUTDOWN: POWER_OFF, EVENT_RESET: RESET, EVENT_CRASH: CRASH}


def explain(index: int, rip: str, reason: str, detail: "Any") -> Event:
    """What the exit ``reason`` of vCPU ``index`` at ``rip`` means for the VM."""
    where = f"vCPU {index} at RIP {rip}"
    if reason == TRIPLE_FAULT:
        return Event(FAULT, f"vCPU {index}" if rip == RESET_RIP else where)
    if reason == SYSTEM_EVENT and detail[0] in SYSTEM_EVENTS:
        return Event(SYSTEM_EVENTS[detail[0]], f"{where} asked for it")
    if reason == DEVICE_FAILED:
        return Event(FAILURE, f"{where} touched a device that failed", detail)
    shown = ", ".join(f"{each:#x}" for each in detail) if isinstance(detail, tuple) else detail
    return Event(FAILURE, f"{where} stopped: {reason}" + ("" if detail is None else f" ({shown})"))


class VcpuThread:
    """Runs ``vcpu``; whatever ends it but ``stop`` goes to ``report``, on the vCPU's own thread.

    ``end_of_interrupt`` hears of the vectors that the guest has served, where the IOAPIC is not KVM's.
    """

    def __init__(
        self,
        index: int,
        vcpu: "Vcpu",
        ports: "Bus",
        mmio: "Bus",
        report: "Callable[[Event], None]",
        host_cpus: "list[int] | None" = None,
        end_of_interrupt: "Callable[[int], None] | None" = None,
    ) -> None:
        self.index = index
        self.vcpu = vcpu
        self._ports = ports
        self._mmio = mmio
        self._report = report
        self._host_cpus = host_cpus
        self._end_of_interrupt = end_of_interrupt
        self._stopping = self._parking = False
        self._alive = _thread.allocate_lock()  # held while the thread lives
        self._inside = _thread.allocate_lock()  # held while it may be in the guest or in a device
        self._gate = _thread.allocate_lock()  # held by who wants it to stay outside

    def start(self) -> None:
        self._alive.acquire()
        self._inside.acquire()
        try:
            _thread.start_new_thread(self._main, ())
        except BaseException:
            self._inside.release()
            self._alive.release()
            raise

    def ask_to_park(self) -> None:
        """Make the thread leave the guest and wait for ``unpark``; returns at once."""
        self._gate.acquire()
        self._parking = True
        self.vcpu.kick()

    def wait_until_parked(self) -> None:
        """Wait until the thread is outside the guest; one that has ended is."""
        with self._inside:
            pass

    def unpark(self) -> None:
        """Let the thread go on, if it was asked to park."""
        if self._parking:
            self._parking = False
            self._gate.release()

    def ask_to_stop(self) -> None:
        """Make the thread leave the guest and end; returns at once."""
        self._stopping = True
        self.vcpu.kick()
        self.unpark()

    def join(self) -> None:
        """Wait for the thread's end."""
        with self._alive:
            pass

    def _pin(self) -> None:
        """Keep to the host CPUs asked for. Raises ConfigError where there is none of them."""
        if self._host_cpus is not None:
            try:
                os.sched_setaffinity(0, self._host_cpus)
            except OSError as error:
                wanted = f"{self.index}@{self._host_cpus}"
                raise ConfigError(
                    "--cpus affinity", wanted, "this process may use no such host CPU"
                ) from error

    def _run(self) -> bool:
        """Run the guest once; return whether it is to go on."""
        reason, detail = self.vcpu.run(self._ports, self._mmio)
        if reason == KICKED:
            return True
        if reason == IOAPIC_EOI and self._end_of_interrupt is not None:
            self._end_of_interrupt(detail)
            return True
        event = explain(self.index, self.vcpu.rip_text(), reason, detail)
        self._report(event)
        return event.kind == CRASH  # a guest that says so goes on to dump or to reboot

    def _main(self) -> None:
        try:
            name_thread(f"vcpu{self.index}")
            self._pin()
            if self.index == 0:
                log.debug("kernel entered")
            while not self._stopping and self._run():
                if self._parking:
                    self._park()
        except PileusError as error:
            gone = isinstance(error, KvmError) and error.errno == EFAULT
            self._report(Event(FAILURE, f"{error}{GONE if gone else ''}"))
        except BaseException as error:
            self._report(Event(FAILURE, f"vCPU {self.index} stopped", error))
        finally:
            self._inside.release()
            self._alive.release()

    def _park(self) -> None:
        self._inside.release()
        try:
            with self._gate:
                pass
        finally:
            self._inside.acquire()

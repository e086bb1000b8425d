"""The VMM: owns the host's ends and the VM, and decides what each event means. All on one thread."""

from pileus import log
from pileus.cleanup import Cleanup
from pileus.config.model import VmmConfig
from pileus.console import Console, open_console
from pileus.errors import ConfigError, PileusError
from pileus.kvm import Kvm
from pileus.kvm.probe import check_host
from pileus.vm import builder
from pileus.vm.vcpu import CRASH, FAILURE, FAULT, POWER_OFF, RESET, Event
from pileus.vmm._signals import SignalFd
from pileus.vmm.lifecycle import NONE, PAUSED, RUNNING, SHUTDOWN, step
from pileus.vmm.loop import READABLE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pileus.cleanup import Closeable
    from pileus.config.model import EventMonitorConfig, SerialConfig, VmConfig
    from pileus.virtio.device import VirtioDevice
    from pileus.vm.vm import Vm
    from pileus.vmm.control import Control
    from pileus.vmm.events import EventMonitor
    from pileus.vmm.operation import Operation

    Tell = Callable[[str, str, dict[str, Any] | None], None]

SIGHUP, SIGINT, SIGQUIT, SIGTERM = 1, 2, 3, 15  # <signal.h>; importing ``signal`` costs a start 4 ms
ENDING_SIGNALS = {SIGHUP: "SIGHUP", SIGINT: "SIGINT", SIGQUIT: "SIGQUIT", SIGTERM: "SIGTERM"}
SIGWINCH = 28  # the terminal has another size


class View:
    """What there is to tell of the VM at one moment; never changed, so that any thread may read it."""

    __slots__ = ("config", "operation", "ptys", "state")

    def __init__(
        self,
        state: str,
        config: "VmConfig | None",
        ptys: dict[str, str],
        operation: "Operation | None" = None,
    ) -> None:
        self.operation = operation  # that is under way; only its progress changes
        self.state = state
        self.config = config
        self.ptys = ptys  # of "serial" and "console": the pty that each is, while there is one


class Vmm:
    """Leads one VM at a time through its life. ``close`` leaves nothing behind, however far things got.

    The methods that ``lifecycle`` knows are what the command line and the API ask for. Each raises
    PileusError, StateError among them, and has changed nothing then. ``tell`` gets source, name and
    properties of what happens, on any thread. Without ``signals`` these are left to who owns the process.
    """

    def __init__(self, tell: "Tell | None" = None, *, signals: bool = True) -> None:
        self._tell = tell or _nobody
        self.loop = Loop()
        self.status = 0  # the process's exit status
        self.is_served = False  # to clients, who may press the power button
        self.outlives_vm = False  # a guest that powers off leaves the process to the next one
        self.more_devices: Sequence[Callable[[], VirtioDevice]] = ()  # of programs that embed us
        self.view = View(NONE, None, {})
        self._cleanup = Cleanup()
        self._cleanup.own(self.loop)
        if signals:
            fd = self._cleanup.own(SignalFd((*ENDING_SIGNALS, SIGWINCH)))
            self.loop.watch(fd.fd, READABLE, lambda _: self._signalled(fd.take()))
        self._kvm: Kvm | None = None
        self._ends = Cleanup()  # the host's ends of the VM, which outlive its reboots
        self._serial: Console | None = None
        self._console: Console | None = None
        self._state = NONE
        self._config: VmConfig | None = None
        self._vm: Vm | None = None
        self._crash_told = False
        self._operation: Operation | None = None

    def close(self) -> None:
        was_on = self._vm is not None
        try:
            self._end_vm()
        finally:
            if was_on:
                self._told("shutdown")
            try:
                self._ends.close()
            finally:
                self._cleanup.close()

    # -- what can be asked for --------------------------------------------------------------------

    def create(self, config: "VmConfig") -> None:
        """Keep the configuration of a VM; nothing of the host is taken yet."""
        after = self._step("create")
        self._config = config
        self._enter(after)

    def boot(self) -> None:
        """Open what the VM needs of the host, build it and let it run."""
        after = self._step("boot")
        if self._state == PAUSED:
            self.resume()
            return
        assert self._config is not None
        if self._config.payload.kernel is None:
            raise ConfigError("--kernel", "is missing", "a VM needs one to boot")
        self._told("booting")
        try:
            self._open_ends(self._config)
            self._build()
        except BaseException:
            self._close_ends()
            raise
        self._enter(after)
        self._told("booted")

    def pause(self) -> None:
        """Stop vCPUs and devices; nobody touches guest memory once this returns."""
        after = self._step("pause")
        self._told("pausing")
        self._running().pause()
        self._enter(after)
        self._told("paused")

    def resume(self) -> None:
        """Let them go on."""
        after = self._step("resume")
        self._told("resuming")
        self._running().resume()
        self._enter(after)
        self._told("resumed")

    def shutdown(self) -> None:
        """End the VM without asking the guest; its configuration stays."""
        self._turn_off(self._step("shutdown"))

    def reboot(self) -> None:
        """The same, and boot it again."""
        after = self._step("reboot")
        self._rebuild()
        self._enter(after)
        self._told("rebooted")

    def delete(self) -> None:
        """End the VM, if there is one, and forget its configuration."""
        before, after = self._state, self._step("delete")
        self._config = None
        self._turn_off(after)
        if before != NONE:
            self._told("deleted")

    def press_power_button(self) -> None:
        self._step("press the power button of")
        self._running().press_power_button()

    def send_nmi(self) -> None:
        self._step("send an NMI to")
        self._running().send_nmi()

    def counters(self) -> "dict[str, dict[str, int]]":
        self._step("read the counters of")
        return self._running().counters()

    def coredump(self, path: str) -> "Operation":
        """Write a core of the VM to the new file ``path``; one that runs is paused meanwhile."""
        from pileus.vmm.operation import Operation

        self._step("dump the memory of")
        vm, was_running = self._running(), self._state == RUNNING
        if was_running:
            self.pause()

        def ended(error: Exception | None) -> None:
            self._operation = None
            if self._vm is not vm:
                return  # it is on its way to another state
            self._enter(self._state)
            if error is None:
                self._told("coredumped")
            if was_running:
                self._resume_or_tell()

        try:
            dump = vm.coredump(path)
            operation = Operation("coredump", dump.size, self.loop, ended)
            operation.start(dump.write)
        except BaseException:
            if was_running:
                self.resume()
            raise
        self._operation = operation
        self._enter(self._state)
        self._told("coredumping")
        return operation

    def _resume_or_tell(self) -> None:
        try:
            self.resume()
        except PileusError as error:
            log.error(f"the VM stays paused after its coredump: {error}")

    def cancel(self) -> None:
        """Give up the long operation that is under way, if there is one."""
        self._step("cancel an operation of")
        if self._operation is not None:
            self._operation.cancel()

    def finish(self, status: int = 0) -> None:
        """End the process once the present callback is over."""
        self.status = status
        self.loop.stop()

    # -- how ---------------------------------------------------------------------------------------

    def _told(self, event: str) -> None:
        """The VM's life, for who listens; what a call led to is told once it can be seen."""
        self._tell("vm", event, None)

    def _noticed(self, device: str, what: str) -> None:
        self._tell("virtio-device", what, {"id": device})

    def _step(self, event: str) -> str:
        return step(self._state, event, self._operation.name if self._operation else "")

    def _running(self) -> "Vm":
        assert self._vm is not None
        return self._vm

    def _enter(self, state: str) -> None:
        self._state = state
        ends = {"serial": self._serial, "console": self._console}
        ptys = {
            name: end.path
            for name, end in ends.items()
            if end is not None and end.path and getattr(self._config, name).mode == "pty"
        }
        self.view = View(state, self._config, ptys, self._operation)

    def _open_ends(self, config: "VmConfig") -> None:
        if self._kvm is None:
            self._kvm = self._cleanup.own(Kvm())
        self._serial = self._open_console("serial", config.serial)
        self._console = self._open_console("console", config.console)

    def _close_ends(self) -> None:
        self._serial = self._console = None
        self._ends.close()

    def _open_console(self, name: str, terminal: "SerialConfig") -> Console | None:
        """The far end of a terminal of the guest, which outlives its reboots; None where that is off."""
        if terminal.mode == "off":
            return None
        console = self._ends.own(
            open_console(terminal.mode, terminal.path or "", name=name, warn=log.warning, quit=self._quit)
        )
        console.start(self.loop)
        if terminal.mode == "tty":
            log.newline = "\r\n"
            self._ends.call(_plain_lines)
        if terminal.mode == "pty":
            log.info(f"{name}: the guest's terminal is {console.path}")
            print(f"\t{name.capitalize()}: {console.path}", flush=True)
        return console

    def _build(self) -> None:
        assert self._kvm is not None
        assert self._config is not None
        vm: Vm | None = None
        self._crash_told = False
        untold: set[str] = (
            set()
        )  # kinds of events on their way: a guest may repeat itself faster than we listen

        def report(event: Event) -> None:
            if event.kind not in untold:
                untold.add(event.kind)
                self.loop.post(lambda: tell(event))

        def tell(event: Event) -> None:
            untold.discard(event.kind)
            self._happened(vm, event)

        vm = builder.build(
            self._config,
            self._kvm,
            self._serial,
            report,
            self.loop,
            self._console,
            events=self.is_served,
            notice=None if self._tell is _nobody else self._noticed,
            more=self.more_devices,
        )
        self._vm = vm
        try:
            vm.start()
        except BaseException:
            self._end_vm()
            raise

    def _rebuild(self) -> None:
        """A new VM from the same configuration, once the old one is gone; consoles stay open."""
        self._told("rebooting")
        self._end_vm()
        try:
            for console in self._consoles():
                console.restart()
            self._build()
        except BaseException:
            self._close_ends()
            self._enter(SHUTDOWN)
            self._told("shutdown")
            raise

    def _turn_off(self, state: str) -> None:
        was_on = self._vm is not None
        try:
            self._end_vm()
        finally:
            self._close_ends()
            self._enter(state)
            if was_on:
                self._told("shutdown")

    def _end_vm(self) -> None:
        if (vm := self._vm) is not None:
            self._vm = None
            if self._operation is not None:
                self._operation.cancel()  # it reads the memory
            vm.stop()
            for line in vm.usage():
                log.info(line)
            vm.close()

    # -- what happens ------------------------------------------------------------------------------

    def _happened(self, vm: "Vm | None", event: Event) -> None:
        """What a VM reported; one that is gone by now is of no interest."""
        if vm is not None and vm is self._vm:
            EVENTS[event.kind](self, event)

    def _powered_off(self, event: Event) -> None:
        log.info("the guest powered off")
        self._ended(0)

    def _reset(self, event: Event) -> None:
        log.info("the guest asked for a reset")
        self._rebooted()

    def _faulted(self, event: Event) -> None:
        log.limited(log.ERROR, f"the guest ended in a triple fault, {event.text}; it is reset")
        self._rebooted()

    def _crashed(self, event: Event) -> None:
        log.limited(log.ERROR, f"the guest reported a panic, {event.text}")
        if not self._crash_told:  # one that says so again and again says nothing new
            self._crash_told = True
            self._tell("guest", "panic", {"reason": event.text})

    def _failed(self, event: Event) -> None:
        log.error(event.text)
        if event.error is not None:
            log.exception(event.error)
        self._ended(1)

    def _rebooted(self) -> None:
        try:
            self._rebuild()
        except PileusError as error:
            if not self.outlives_vm:
                raise
            log.error(str(error))
            return
        self._enter(RUNNING)  # also one that was paused just before we heard of it
        self._told("rebooted")

    def _ended(self, status: int) -> None:
        """The VM is off, and with it the process, unless that waits for another VM."""
        if self.outlives_vm:
            self._turn_off(SHUTDOWN)
        else:
            self.finish(status)

    def _consoles(self) -> list[Console]:
        return [console for console in (self._serial, self._console) if console is not None]

    def _signalled(self, numbers: list[int]) -> None:
        for number in numbers:
            if number == SIGWINCH:
                for console in self._consoles():
                    console.resized()
                continue
            log.info(f"ending on {ENDING_SIGNALS[number]}")
            self.finish(128 + number)

    def _quit(self) -> None:
        log.info("ending on Ctrl-A x")
        self.finish()


EVENTS = {
    POWER_OFF: Vmm._powered_off,
    RESET: Vmm._reset,
    FAULT: Vmm._faulted,
    CRASH: Vmm._crashed,
    FAILURE: Vmm._failed,
}


def _nobody(_source: str, _event: str, _properties: "dict[str, Any] | None") -> None:
    pass


def _plain_lines() -> None:
    log.newline = "\n"


def run(
    config: VmmConfig, serve: "Callable[[Control], Closeable] | None" = None, *, signals: bool = True
) -> int:
    """Run the VM of ``config`` to its end; returns the exit status. Raises PileusError.

    ``serve`` opens an API, by which other VMs may come and go; without a VM to begin with, it is needed. A
    process that has other work than this VMM keeps its ``signals`` to itself.
    """
    monitor = None if config.event_monitor is None else _monitor(config.event_monitor)
    try:
        return _run(config, serve, monitor, signals)
    finally:
        if monitor is not None:
            monitor.close()


def _monitor(config: "EventMonitorConfig") -> "EventMonitor":
    from pileus.vmm.events import EventMonitor

    return EventMonitor(config)


def _run(
    config: VmmConfig,
    serve: "Callable[[Control], Closeable] | None",
    monitor: "EventMonitor | None",
    signals: bool,
) -> int:
    check_host()
    if config.vm is None and serve is None:
        raise ConfigError("--kernel", "is missing", "without --api-socket, a VM needs one")
    tell = monitor or _nobody
    tell("vmm", "starting", None)
    vmm = Vmm(tell, signals=signals)
    api: Closeable | None = None
    try:
        if serve is not None:
            from pileus.vmm.control import Control

            vmm.is_served = True
            api = serve(Control(vmm))
        if config.vm is None:
            vmm.outlives_vm = True
        else:
            vmm.create(config.vm)
            vmm.boot()
        vmm.loop.run()
    finally:
        try:
            if api is not None:
                api.close()  # while the loop still takes what its clients ask for
        finally:
            try:
                vmm.close()
            finally:
                tell("vmm", "shutdown", None)
    return vmm.status

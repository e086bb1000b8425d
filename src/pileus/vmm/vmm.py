"""The VMM: owns the host's ends and the VM, and decides what each event means. All on one thread."""

from pileus import log
from pileus.cleanup import Cleanup
from pileus.config.model import VmmConfig
from pileus.console import Console, open_console
from pileus.errors import ConfigError
from pileus.kvm import Kvm
from pileus.kvm.probe import check_host
from pileus.vm import builder
from pileus.vm.vcpu import CRASH, FAILURE, FAULT, POWER_OFF, RESET, Event
from pileus.vmm._signals import SignalFd
from pileus.vmm.loop import READABLE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.model import SerialConfig, VmConfig
    from pileus.vm.vm import Vm

SIGHUP, SIGINT, SIGQUIT, SIGTERM = 1, 2, 3, 15  # <signal.h>; importing ``signal`` costs a start 4 ms
ENDING_SIGNALS = {SIGHUP: "SIGHUP", SIGINT: "SIGINT", SIGQUIT: "SIGQUIT", SIGTERM: "SIGTERM"}
SIGWINCH = 28  # the terminal has another size


class Vmm:
    """Runs one VM through its reboots to its end. ``close`` leaves nothing behind, however far things got."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.status = 0  # the process's exit status
        self._cleanup = Cleanup()
        self._cleanup.own(self.loop)
        self._signals = self._cleanup.own(SignalFd((*ENDING_SIGNALS, SIGWINCH)))
        self.loop.watch(self._signals.fd, READABLE, lambda _: self._signalled())
        self._kvm: Kvm | None = None
        self._serial: Console | None = None
        self._console: Console | None = None
        self._config: VmConfig | None = None
        self._vm: Vm | None = None

    def close(self) -> None:
        try:
            self._end_vm()
        finally:
            self._cleanup.close()

    def boot(self, config: "VmConfig") -> None:
        """Open what the VM needs of the host, build it and let it run. Raises PileusError."""
        self._config = config
        self._kvm = self._cleanup.own(Kvm())
        self._serial = self._open_console("serial", config.serial)
        self._console = self._open_console("console", config.console)
        self._build()

    def _open_console(self, name: str, terminal: "SerialConfig") -> Console | None:
        """The far end of a terminal of the guest, which outlives its reboots; None where that is off."""
        if terminal.mode == "off":
            return None
        console = self._cleanup.own(
            open_console(terminal.mode, terminal.path or "", name=name, warn=log.warning, quit=self._quit)
        )
        console.start(self.loop)
        if terminal.mode == "tty":
            log.newline = "\r\n"
            self._cleanup.call(_plain_lines)
        if terminal.mode == "pty":
            log.info(f"{name}: the guest's terminal is {console.path}")
            print(f"\t{name.capitalize()}: {console.path}", flush=True)
        return console

    def _build(self) -> None:
        assert self._kvm is not None
        assert self._config is not None
        vm: Vm | None = None
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

        vm = builder.build(self._config, self._kvm, self._serial, report, self.loop, self._console)
        self._vm = vm
        vm.start()

    def _end_vm(self) -> None:
        if (vm := self._vm) is not None:
            self._vm = None
            vm.stop()
            for line in vm.usage():
                log.info(line)
            vm.close()

    def _happened(self, vm: "Vm | None", event: Event) -> None:
        """What a VM reported; one that is gone by now is of no interest."""
        if vm is not None and vm is self._vm:
            EVENTS[event.kind](self, event)

    def _powered_off(self, event: Event) -> None:
        log.info("the guest powered off")
        self._finish(0)

    def _reset(self, event: Event) -> None:
        log.info("the guest asked for a reset")
        self._reboot()

    def _faulted(self, event: Event) -> None:
        log.limited(log.ERROR, f"the guest ended in a triple fault, {event.text}; it is reset")
        self._reboot()

    def _crashed(self, event: Event) -> None:
        log.limited(log.ERROR, f"the guest reported a panic, {event.text}")

    def _failed(self, event: Event) -> None:
        log.error(event.text)
        if event.error is not None:
            log.exception(event.error)
        self._finish(1)

    def _reboot(self) -> None:
        """A new VM from the same configuration, once the old one is gone; consoles stay open."""
        self._end_vm()
        for console in self._consoles():
            console.restart()
        self._build()

    def _consoles(self) -> list[Console]:
        return [console for console in (self._serial, self._console) if console is not None]

    def _signalled(self) -> None:
        for number in self._signals.take():
            if number == SIGWINCH:
                for console in self._consoles():
                    console.resized()
                continue
            log.info(f"ending on {ENDING_SIGNALS[number]}")
            self._finish(128 + number)

    def _quit(self) -> None:
        log.info("ending on Ctrl-A x")
        self._finish(0)

    def _finish(self, status: int) -> None:
        self.status = status
        self.loop.stop()


EVENTS = {
    POWER_OFF: Vmm._powered_off,
    RESET: Vmm._reset,
    FAULT: Vmm._faulted,
    CRASH: Vmm._crashed,
    FAILURE: Vmm._failed,
}


def _plain_lines() -> None:
    log.newline = "\n"


def run(config: VmmConfig) -> int:
    """Run the VM of ``config`` to its end; returns the exit status. Raises PileusError."""
    check_host()
    if config.vm is None:
        raise ConfigError(
            "--kernel", "is missing", "without the HTTP API, which is not built yet, a VM needs one"
        )
    vmm = Vmm()
    try:
        vmm.boot(config.vm)
        vmm.loop.run()
    finally:
        vmm.close()
    return vmm.status

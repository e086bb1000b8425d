"""The options: which flag fills which field. What a field means and takes stands in ``config.model``."""

SINGLE = "single"  # one value, once; a struct's may be missing and is then its default
LIST = "list"  # values up to the next flag; the flag may be repeated
COUNT = "count"  # no value; how often it was given counts, and -vv is -v -v
SWITCH = "switch"  # no value


class Option:
    """``flag`` fills the field at ``target``, a dotted path from VmmConfig. A switch has ``help`` instead."""

    __slots__ = ("flag", "help", "short", "takes", "target")

    def __init__(self, flag: str, target: str, takes: str = SINGLE, short: str = "", help: str = "") -> None:
        self.flag = flag
        self.target = target
        self.takes = takes
        self.short = short
        self.help = help


HELP = Option("--help", "", SWITCH, "-h", "print this and exit")
VERSION = Option("--version", "", SWITCH, "-V", "print the version and exit")

GROUPS = {
    "Boot": (
        Option("--kernel", "vm.payload.kernel"),
        Option("--cmdline", "vm.payload.cmdline"),
        Option("--initramfs", "vm.payload.initramfs"),
    ),
    "Machine": (
        Option("--cpus", "vm.cpus"),
        Option("--memory", "vm.memory"),
        Option("--pci", "vm.pci"),
        Option("--irqchip", "vm.irqchip"),
    ),
    "Devices": (
        Option("--disk", "vm.disks", LIST),
        Option("--net", "vm.net", LIST),
        Option("--pmem", "vm.pmem", LIST),
        Option("--rng", "vm.rng"),
        Option("--fs", "vm.fs", LIST),
        Option("--vhost-user-net", "vm.vhost_user_net", LIST),
        Option("--vhost-user-blk", "vm.vhost_user_blk", LIST),
        Option("--balloon", "vm.balloon"),
        Option("--vsock", "vm.vsock"),
        Option("--device", "vm.devices", LIST),
        Option("--user-device", "vm.user_devices", LIST),
    ),
    "Terminals of the guest": (
        Option("--serial", "vm.serial"),
        Option("--console", "vm.console"),
    ),
    "This process": (
        Option("--api-socket", "api_socket"),
        Option("--event-monitor", "event_monitor"),
        Option("--seccomp", "seccomp"),
        Option("--log-file", "log_file"),
        Option("-v", "verbosity", COUNT),
        HELP,
        VERSION,
    ),
}
OPTIONS = tuple(option for group in GROUPS.values() for option in group)

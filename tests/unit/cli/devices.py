"""A table of options that has what today's has not yet: lists of devices."""

from pileus.cli.options import COUNT, LIST, SWITCH, Option
from pileus.config.declare import Struct, field
from pileus.config.kinds import Count, Kind, Many, Nested, Path, Switch, Times


class Disk(Struct):
    path: str = field(Path(), "the image")
    readonly: bool = field(Switch(), "keep it as it is", default=False)


class Net(Struct):
    tap: str | None = field(Kind(), "the TAP", default=None)
    queues: int = field(Count(1, 8), "how many", default=2)


class Rng(Struct):
    src: str = field(Path(), "where from", default="/dev/urandom")


class Machine(Struct):
    disks: list[Disk] = field(Many(Disk), "disks", factory=lambda _: [])
    net: list[Net] = field(Many(Net), "networks", factory=lambda _: [])
    rng: Rng = field(Nested(Rng), "entropy", factory=lambda _: Rng())


class Root(Struct):
    machine: Machine = field(Nested(Machine), "the machine", factory=lambda _: Machine())
    label: str = field(Kind(), "its name", default="")
    noise: int = field(Times(), "how much is said", default=0)


OPTIONS = (
    Option("--disk", "machine.disks", LIST),
    Option("--net", "machine.net", LIST),
    Option("--rng", "machine.rng"),
    Option("--label", "label"),
    Option("-v", "noise", COUNT),
    Option("--help", "", SWITCH, "-h", "help"),
)

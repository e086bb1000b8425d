"""The words of a command line to a configuration."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.cli.args import build, scan
from pileus.cli.options import OPTIONS
from pileus.config.check import check
from pileus.config.declare import Struct
from pileus.config.grammar import format_struct
from pileus.config.model import ConsoleConfig, CpusConfig, MemoryConfig, VmmConfig
from pileus.errors import ConfigError

from ..config.strategies import ARGUMENTS, of_struct
from . import devices
from .devices import Disk, Machine, Net, Rng, Root

READ: dict[str, Root] = {
    "": Root(),
    "--disk path=a path=b": Root(machine=Machine(disks=[Disk(path="a"), Disk(path="b")])),
    "--disk path=a --disk path=b": Root(machine=Machine(disks=[Disk(path="a"), Disk(path="b")])),
    "--disk path=a --label x --disk path=b path=c": Root(
        machine=Machine(disks=[Disk(path="a"), Disk(path="b"), Disk(path="c")]), label="x"
    ),
    "--disk=path=a --net tap=,queues= queues=4": Root(
        machine=Machine(disks=[Disk(path="a")], net=[Net(), Net(queues=4)])
    ),
    "--rng": Root(),
    "--rng src=/dev/zero": Root(machine=Machine(rng=Rng(src="/dev/zero"))),
    "--rng --label=x": Root(label="x"),
    "--label=--x": Root(label="--x"),
    "--label=": Root(),
    "--label a=b": Root(label="a=b"),
    "-v": Root(noise=1),
    "-vvv -v": Root(noise=4),
    "--help -h": Root(),
}
REFUSED = {
    "--dsk path=a": "option --dsk: there is no such option; did you mean --disk?",
    "--dis path=a": "option --dis: there is no such option; did you mean --disk?",
    "--xyzzy=1": "option --xyzzy: there is no such option; see --help",
    "-x": "option -x: there is no such option; see --help",
    "-vx": "option -vx: there is no such option; see --help",
    "-hh": "option -hh: there is no such option; see --help",
    "-disk path=a": "option -disk: there is no such option; did you mean --disk?",
    "-": "option -: there is no such option; see --help",
    "--": "option --: there is no such option; see --help",
    "disk": "argument disk: an option is needed here; see --help",
    "--label a b": "argument b: an option is needed here; see --help",
    "--disk=path=a path=b": "argument path: an option is needed here; see --help",
    "--disk": "--disk without a value: it takes one or more; see --help",
    "--disk --rng": "--disk without a value: it takes one or more; see --help",
    "--label": (
        "--label without a value: it takes any text; a value that starts with - is written --label=VALUE"
    ),
    "--label --rng": (
        "--label without a value: it takes any text; a value that starts with - is written --label=VALUE"
    ),
    "--label a --label b": "--label b: it may be given only once",
    "--rng --rng": '--rng "": it may be given only once',
    "--help=yes": "--help yes: it takes no value",
    "-v=3": "-v 3: it takes no value",
    "--disk path=a readonly=on": "--disk readonly=on: path= is required",
    "--disk path=a,red=on": "--disk red=on: there is no key red; keys are path, readonly",
}


def read(words: list[str]) -> Root:
    return build(Root, devices.OPTIONS, scan(words, devices.OPTIONS))


@pytest.mark.parametrize("line", READ)
def test_a_command_line_is_read(line: str) -> None:
    assert read(line.split()) == READ[line]


@pytest.mark.parametrize("line", REFUSED)
def test_anything_else_is_refused_in_one_sentence(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(line.split())
    assert str(caught.value) == REFUSED[line]


def test_an_empty_word_is_no_option() -> None:
    with pytest.raises(ConfigError, match=r'^argument "": an option is needed here'):
        read([""])


def test_every_switch_is_noted() -> None:
    assert scan(["-h"], devices.OPTIONS) == {"--help": [""]}


WORDS = st.sampled_from(
    [name for option in OPTIONS for name in (option.flag, f"{option.flag}=", option.short) if name]
)


@given(st.lists(WORDS | ARGUMENTS | st.tuples(WORDS, ARGUMENTS).map("=".join)))
def test_any_words_are_read_or_refused(words: list[str]) -> None:
    _read_or_refuse(words)


@given(st.lists(st.text(st.sampled_from("-v=hkernlcpus"), max_size=9)))
def test_any_words_like_options_are_read_or_refused(words: list[str]) -> None:
    _read_or_refuse(words)


def _read_or_refuse(words: list[str]) -> None:
    """Without any other exception."""
    with suppress(ConfigError):
        check(build(VmmConfig, OPTIONS, scan(words, OPTIONS)))


@given(of_struct(CpusConfig), of_struct(MemoryConfig), of_struct(ConsoleConfig), st.integers(0, 6), ARGUMENTS)
def test_a_configuration_survives_its_command_line(
    cpus: Struct, memory: Struct, console: Struct, verbosity: int, kernel: str
) -> None:
    words = [
        f"--cpus={format_struct(cpus)}",
        f"--memory={format_struct(memory)}",
        f"--console={format_struct(console)}",
        f"--kernel={kernel or 'vmlinux'}",
        *["-v"] * verbosity,
    ]
    config = build(VmmConfig, OPTIONS, scan(words, OPTIONS))
    assert config.vm is not None
    assert (config.vm.cpus, config.vm.memory, config.vm.console) == (cpus, memory, console)
    assert (config.vm.payload.kernel, config.verbosity) == (kernel or "vmlinux", verbosity)

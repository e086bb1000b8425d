"""key=value,key=value to a struct and back."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pileus.config import grammar
from pileus.config.declare import Struct, field
from pileus.config.kinds import Count, Kind, Nested, Path, Printable, Size, Switch
from pileus.config.model import (
    ApiSocketConfig,
    BalloonConfig,
    ConsoleConfig,
    CpusConfig,
    DeviceConfig,
    DiskConfig,
    EventMonitorConfig,
    FsConfig,
    MemoryConfig,
    NetConfig,
    PmemConfig,
    RngConfig,
    SerialConfig,
    UserDeviceConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VsockConfig,
)
from pileus.errors import ConfigError

from .strategies import ARGUMENTS, of_struct

STRUCTS = [
    CpusConfig,
    MemoryConfig,
    SerialConfig,
    ConsoleConfig,
    RngConfig,
    NetConfig,
    DiskConfig,
    BalloonConfig,
    FsConfig,
    VhostUserNetConfig,
    VhostUserBlkConfig,
    PmemConfig,
    DeviceConfig,
    UserDeviceConfig,
    VsockConfig,
    ApiSocketConfig,
    EventMonitorConfig,
]


class Disk(Struct):
    """What the model has no example of yet: a required key, and no bare one."""

    path: str = field(Path(), "the image")
    size: int = field(Size(), "its size", default=0)
    readonly: bool = field(Switch(), "keep it as it is", default=False)
    serial: str = field(Printable(20), "its name", default="none")


READ = {
    "path=/a": Disk(path="/a"),
    "size=4K,path=/a": Disk(path="/a", size=4096),
    "path=/a,path=/b": Disk(path="/b"),
    "path=/a,size=4K,size=": Disk(path="/a"),
    "path=/a,serial=": Disk(path="/a"),
    'path=/a,serial=""': Disk(path="/a", serial=""),
    " path=/a, readonly=true": Disk(path="/a", readonly=True),
    'path="/a,b",size=1': Disk(path="/a,b", size=1),
    'path=/a","b': Disk(path="/a,b"),
    'path="say ""hi"""': Disk(path='say "hi"'),
    "path=[/a,/b]": Disk(path="[/a,/b]"),
    'path="a[",size=1': Disk(path="a[", size=1),
    "path=/a=b": Disk(path="/a=b"),
    "path=/a=": Disk(path="/a="),
    "path=/a b": Disk(path="/a b"),
}
REFUSED = {
    "": '--disk "": the value is empty; write key=value,key=value',
    " ": "--disk  : the value is empty; write key=value,key=value",
    ",": "--disk ,: an item between two commas is empty; write key=value,key=value",
    "path=/a,": "--disk path=/a,: an item between two commas is empty; write key=value,key=value",
    "path=/a,,size=1": (
        "--disk path=/a,,size=1: an item between two commas is empty; write key=value,key=value"
    ),
    "/a": "--disk /a: write key=value; keys are path, size, readonly, serial",
    "path=/a,on": "--disk on: write key=value; keys are path, size, readonly, serial",
    "=/a": "--disk =/a: the key before = is missing; keys are path, size, readonly, serial",
    "pth=/a": "--disk pth=/a: there is no key pth; keys are path, size, readonly, serial",
    "Path=/a": "--disk Path=/a: there is no key Path; keys are path, size, readonly, serial",
    "size=1": "--disk size=1: path= is required",
    "path=": "--disk path=: path= is required",
    'path=""': '--disk path="": path takes a path, not an empty one',
    "path=/a,readonly=yes": "--disk readonly=yes: readonly takes on or off",
    "path=/a,size=1k": (
        "--disk size=1k: size takes a number of bytes below 2^64, in decimal, perhaps with K, M, G or T"
        " (powers of 1024)"
    ),
    "path=/a,serial=é": "--disk serial=é: serial takes printable ASCII, less than 20 bytes",
    'path="/a': '--disk path="/a: a " is not closed; put a value that holds [ or ] in quotes',
    "path=[a": "--disk path=[a: a [ is not closed; put a value that holds [ or ] in quotes",
    "path=a]": "--disk path=a]: a ] has no [ before it; put a value that holds [ or ] in quotes",
    "path=a],[": "--disk path=a],[: a ] has no [ before it; put a value that holds [ or ] in quotes",
}


@pytest.mark.parametrize("text", READ)
def test_a_value_is_read(text: str) -> None:
    assert grammar.parse(Disk, "--disk", text) == READ[text]


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grammar.parse(Disk, "--disk", text)
    assert str(caught.value) == REFUSED[text]


def test_a_value_without_a_key_goes_to_the_bare_field() -> None:
    assert grammar.parse(CpusConfig, "--cpus", "4,max=8") == CpusConfig(boot=4, max=8)
    assert grammar.parse(CpusConfig, "--cpus", "max=8,4") == CpusConfig(boot=4, max=8)
    assert grammar.parse(ApiSocketConfig, "--api-socket", '"/a=b"').path == "/a=b"


def test_an_error_of_the_bare_field_shows_what_was_written() -> None:
    with pytest.raises(ConfigError, match=r"^--cpus 0: boot takes a whole number from 1 to 4096$"):
        grammar.parse(CpusConfig, "--cpus", "0")


def test_a_key_can_imply_another() -> None:
    assert grammar.parse(SerialConfig, "--serial", "file=/a").mode == "file"
    assert grammar.parse(SerialConfig, "--serial", "file=").mode == "file"
    assert grammar.parse(SerialConfig, "--serial", "tty,file=/a").mode == "tty"


def test_an_error_does_not_repeat_a_long_value_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        grammar.parse(Disk, "--disk", "path=/a,size=" + "9" * 100_000)
    assert "(100005 characters)" in str(caught.value)
    assert len(str(caught.value)) < 300


@given(ARGUMENTS)
def test_a_quoted_value_is_read_as_it_was(text: str) -> None:
    assert grammar.unquote(grammar.quote(text)) == text
    assert grammar.split(f"a={grammar.quote(text)},b=") == [f"a={grammar.quote(text)}", "b="]


@given(st.lists(ARGUMENTS, min_size=1))
def test_split_takes_nothing_away(texts: list[str]) -> None:
    joined = ",".join(texts)
    try:
        pieces = grammar.split(joined)
    except ValueError:
        assume(False)
    assert ",".join(pieces) == joined


@given(st.data(), st.sampled_from([*STRUCTS, Disk]))
def test_a_struct_survives_writing_and_reading(data: st.DataObject, struct: type[Struct]) -> None:
    value = data.draw(of_struct(struct))
    text = grammar.format_struct(value)
    assume(text)  # a struct that says nothing is not written
    assert grammar.parse(struct, "--option", text) == value


@given(st.sampled_from([*STRUCTS, Disk]), ARGUMENTS)
def test_any_text_is_read_or_refused(struct: type[Struct], text: str) -> None:
    _read_or_refuse(struct, text)


@given(st.data(), st.sampled_from([*STRUCTS, Disk]))
def test_any_keys_with_any_values_are_read_or_refused(data: st.DataObject, struct: type[Struct]) -> None:
    values = ARGUMENTS | st.text(st.sampled_from('0123456789KMGT[]"@:,-=onf'), max_size=12)
    items = st.tuples(st.sampled_from(sorted(struct.fields)), values).map("=".join)
    _read_or_refuse(struct, ",".join(data.draw(st.lists(items))))


def _read_or_refuse(struct: type[Struct], text: str) -> None:
    """Either way without any other exception; what was read reads back the same."""
    try:
        value = grammar.parse(struct, "--option", text)
    except ConfigError:
        return
    if written := grammar.format_struct(value):
        again = grammar.parse(struct, "--option", written)
        assert again == value or "file" in struct.fields  # an implied mode gives way to an explicit one


def test_a_key_of_old_names_the_field_of_today() -> None:
    assert grammar.parse(VsockConfig, "--vsock", "cid=3,sock=/s") == VsockConfig(cid=3, socket="/s")
    with pytest.raises(ConfigError, match=r"^--vsock cid=3: socket= is required$"):
        grammar.parse(VsockConfig, "--vsock", "cid=3")


def test_every_struct_of_the_model_is_tried_here() -> None:
    nested = [
        cls
        for cls in Struct.__subclasses__() + SerialConfig.__subclasses__()
        if cls.__module__ == "pileus.config.model"
    ]
    leaves = [cls for cls in nested if not any(isinstance(each.kind, Nested) for each in cls.fields.values())]
    scattered = {
        "PayloadConfig",  # an option for each of its fields
        "CoredumpConfig",  # of the API alone
    }
    assert {cls.__name__ for cls in leaves} - scattered == {cls.__name__ for cls in STRUCTS}


def test_kinds_describe_themselves() -> None:
    assert Kind().read('"a,b"') == "a,b"
    assert Count(1, 3).allowed == "a whole number from 1 to 3"

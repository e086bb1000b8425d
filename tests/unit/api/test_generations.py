"""One configuration in the words of two generations of clients."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.api import generations
from pileus.config import kinds, wire
from pileus.config.declare import Struct
from pileus.config.model import VmConfig
from pileus.errors import ConfigError
from tests.unit.config import strategies

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


def of_kind(kind: kinds.Kind) -> st.SearchStrategy[Any]:
    """Values that JSON can carry: paths that are no UTF-8 come from command lines alone."""
    if isinstance(kind, kinds.Many):
        return st.lists(of_struct(kind.struct), max_size=2)
    if isinstance(kind, kinds.Nested):
        return of_struct(kind.struct)
    return TEXT if type(kind) in (kinds.Path, kinds.Kind) else strategies.of_kind(kind)


def of_struct(struct: type[Struct]) -> st.SearchStrategy[Any]:
    named = {name: of_kind(field.kind) for name, field in struct.fields.items()}
    needed = {name: values for name, values in named.items() if struct.fields[name].required}
    optional = {name: values for name, values in named.items() if name not in needed}
    return st.fixed_dictionaries(needed, optional=optional).map(lambda values: struct(**values))


def as_told(config: VmConfig) -> VmConfig:
    """As it comes back: with defaults for what clients of today cannot read as null, and so on."""
    for fs in config.fs:
        fs.socket, fs.sock = fs.socket or fs.sock, None
    if config.cpus.max_phys_bits is None:
        config.cpus.max_phys_bits = 46
    for terminal in (config.serial, config.console):
        if terminal.mode == "pty":
            terminal.file = None
    return config


@given(of_struct(VmConfig))
def test_what_is_told_means_the_same(config: VmConfig) -> None:
    told = generations.encode(config)
    try:
        again = generations.decode(told)
    except ConfigError as error:
        assert "says another thing" not in str(error)  # noqa: PT017
        raise
    assert again == as_told(config)


def test_release_0_3_is_understood() -> None:
    body = {
        "cpus": {"cpu_count": 3},
        "memory": {"size": 1 << 30, "file": None},
        "kernel": {"path": "/k"},
        "cmdline": {"args": "console=hvc0"},
        "disks": [{"path": "/d", "iommu": False}],
        "net": [
            {
                "tap": None,
                "ip": "10.0.0.1",
                "mask": "255.255.255.0",
                "mac": "2E:00:00:00:00:01",
                "iommu": False,
            }
        ],
        "rng": {"src": "/dev/urandom", "iommu": False},
        "serial": {"file": None, "mode": "Null", "iommu": False},
        "console": {"file": "/out", "mode": "File", "iommu": False},
        "fs": None,
        "pmem": None,
        "devices": None,
        "vhost_user_net": None,
        "vhost_user_blk": None,
        "vsock": None,
        "iommu": False,
    }
    config = generations.decode(body)
    assert (config.cpus.boot, config.cpus.max) == (3, 3)
    assert (config.payload.kernel, config.payload.cmdline) == ("/k", "console=hvc0")
    assert (config.console.mode, config.console.file) == ("file", "/out")
    assert config.net[0].mac == "2e:00:00:00:00:01"
    told = generations.encode(config)
    assert told["cpus"]["cpu_count"] == told["cpus"]["boot_vcpus"] == 3
    assert told["kernel"] == {"path": "/k"}
    assert told["cmdline"] == {"args": "console=hvc0"}
    assert told["payload"]["kernel"] == "/k"


def test_today_is_understood() -> None:
    body = {
        "payload": {"kernel": "/k", "cmdline": "quiet", "initramfs": "/i", "firmware": None},
        "cpus": {
            "boot_vcpus": 1,
            "max_vcpus": 4,
            "topology": {"threads_per_core": 1, "cores_per_die": 4, "dies_per_package": 1, "packages": 1},
            "affinity": [{"vcpu": 0, "host_cpus": [3, 1]}],
            "features": {"amx": False},
        },
        "memory": {"size": 1 << 30, "shared": True, "hotplug_method": "Acpi", "hotplug_size": None},
        "serial": {"mode": "Socket", "socket": "/s"},
        "console": {"mode": "Off"},
        "disks": [
            {
                "path": "/d",
                "readonly": True,
                "direct": False,
                "num_queues": 2,
                "queue_size": 1024,
                "vhost_user": False,
                "image_type": "Raw",
                "rate_limiter_config": None,
            }
        ],
        "balloon": {"size": 0, "free_page_reporting": True},
        "platform": None,
        "watchdog": False,
    }
    config = generations.decode(body)
    assert (config.cpus.boot, config.cpus.max, config.cpus.topology) == (1, 4, (1, 4, 1, 1))
    assert config.cpus.affinity == {0: [1, 3]}
    assert [(disk.path, disk.readonly, disk.image_type) for disk in config.disks] == [("/d", True, "raw")]
    assert config.balloon is not None
    assert config.balloon.free_page_reporting
    assert (config.serial.mode, config.serial.socket, config.console.mode) == ("socket", "/s", "off")


def test_back_ends_of_release_0_3_are_understood() -> None:
    vu_cfg = {"sock": "/s", "num_queues": 4, "queue_size": 512}
    body = {
        "vhost_user_net": [{"mac": "2e:00:00:00:00:01", "vu_cfg": vu_cfg}],
        "vhost_user_blk": [{"wce": False, "vu_cfg": vu_cfg}],
        "fs": [{"tag": "t", "sock": "/f", "num_queues": 1, "queue_size": 128, "cache_size": 1 << 30}],
    }
    config = generations.decode(body)
    net, blk, fs = config.vhost_user_net[0], config.vhost_user_blk[0], config.fs[0]
    assert (net.sock, net.num_queues, net.queue_size) == ("/s", 4, 512)
    assert (blk.sock, blk.wce) == ("/s", False)
    assert (fs.path, fs.cache_size) == ("/f", 1 << 30)
    told = generations.encode(config)
    assert told["vhost_user_net"][0]["vu_cfg"] == told["vhost_user_blk"][0]["vu_cfg"] == vu_cfg
    assert told["fs"][0]["sock"] == told["fs"][0]["socket"] == "/f"
    assert generations.decode(told) == as_told(config)


def test_a_terminal_that_is_on_a_pty_may_name_it() -> None:
    config = generations.decode({"serial": {"mode": "Pty", "file": "/dev/pts/3"}})
    assert (config.serial.mode, config.serial.file) == ("pty", None)


WRONG: dict[str, tuple[Any, str]] = {
    "no object": ([], r"the body \[\]: it takes an object"),
    "null": (None, "the body null: it takes an object"),
    "unknown": ({"cpu": 1}, "cpu is unknown: fields are cpus, memory"),
    "unknown within": ({"cpus": {"count": 1}}, "cpus.count is unknown: fields are boot_vcpus"),
    "unknown in a list": ({"net": [{}, {"a": 1}]}, r"net\[1\].a is unknown"),
    "a string for a number": ({"cpus": {"boot_vcpus": "1"}}, 'cpus.boot_vcpus "1": it takes a whole number'),
    "a boolean for a number": ({"cpus": {"boot_vcpus": True}}, "cpus.boot_vcpus true: it takes a whole"),
    "a fraction": ({"memory": {"size": 1.5}}, "memory.size 1.5: it takes a number of bytes below"),
    "too large": ({"memory": {"size": 1 << 64}}, "memory.size 18446744073709551616: it takes"),
    "a number for a switch": ({"memory": {"shared": 1}}, "memory.shared 1: it takes true or false"),
    "a number for a path": ({"payload": {"kernel": 1}}, "payload.kernel 1: it takes a path"),
    "half a character": ({"payload": {"kernel": "\ud800"}}, r'payload.kernel "\\ud800": it takes a path'),
    "a mode of nobody": ({"serial": {"mode": "tty"}}, 'serial.mode "tty": it takes Off, Null, Tty'),
    "an object for a list": ({"net": {}}, "net {}: it takes a list of objects"),
    "a list for an object": ({"cpus": []}, r"cpus \[\]: it takes an object"),
    "a part of a topology": ({"cpus": {"topology": {"packages": 1}}}, "cpus.topology .*: it takes an object"),
    "a vCPU twice": (
        {"cpus": {"affinity": [{"vcpu": 0, "host_cpus": [0]}] * 2}},
        "cpus.affinity .*: it takes a list of objects",
    ),
    "two kernels": (
        {"kernel": {"path": "/a"}, "payload": {"kernel": "/b"}},
        'kernel.path "/a": payload.kernel says another thing',
    ),
    "two counts": ({"cpus": {"cpu_count": 1, "boot_vcpus": 2}}, "cpus.cpu_count 1: cpus.boot_vcpus says"),
    "an old object": ({"kernel": "/k"}, 'kernel "/k": it takes an object'),
    "more in an old object": ({"kernel": {"path": "/k", "a": 1}}, "kernel.a 1: the only field is path"),
    "a payload of no kind": ({"kernel": {"path": "/k"}, "payload": 1}, "payload 1: it takes an object"),
    "what is not there": ({"watchdog": True}, "watchdog true: only false or null is possible yet"),
    "two sockets": (
        {"fs": [{"tag": "t", "sock": "/a", "socket": "/b"}]},
        r'fs\[0\].sock "/a": socket says another thing',
    ),
    "more of a back-end": (
        {"vhost_user_blk": [{"vu_cfg": {"wce": True}}]},
        r"vhost_user_blk\[0\].vu_cfg.wce true: fields are sock",
    ),
    "no back-end": ({"vhost_user_blk": [{"vu_cfg": 1}]}, r"vhost_user_blk\[0\].vu_cfg 1: it takes an object"),
    "a back-end without a socket": (
        {"vhost_user_blk": [{"vu_cfg": {}}]},
        r"vhost_user_blk\[0\].sock is missing: it takes a path",
    ),
    "0 is not false": ({"watchdog": 0}, "watchdog 0: only false or null"),
    "within": ({"memory": {"hotplug_size": 1}}, "memory.hotplug_size 1: only null or 0 is possible yet"),
}


@pytest.mark.parametrize(("body", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_by_its_path(body: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        generations.decode(body)


def test_null_is_the_default() -> None:
    assert generations.decode(dict.fromkeys(wire.wire_fields(VmConfig))) == VmConfig()


def test_a_value_that_the_other_field_implies_need_not_be_said() -> None:
    assert generations.decode({"serial": {"file": "/out"}}).serial.mode == "file"


def test_the_default_is_what_the_schema_says() -> None:
    for name, schema in generations.schemas().items():
        for key, told in schema["properties"].items():
            assert told.get("description") or "$ref" in told or told.get("deprecated"), (name, key)


def test_the_table_of_what_is_not_there_names_only_structs_of_the_model() -> None:
    assert {struct.__name__ for struct in wire.structs(VmConfig)} >= set(generations.NEUTRAL)

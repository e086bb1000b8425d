"""Python values to a configuration, and the sentence about each that is none."""

from pathlib import Path
from typing import Any

import pytest

from pileus.config.model import (
    BalloonConfig,
    ConsoleConfig,
    CpusConfig,
    DiskConfig,
    FsConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    SerialConfig,
    VmConfig,
)
from pileus.errors import ConfigError
from pileus.sdk.configure import configure, payload_words, vm_words

MIB = 1 << 20
GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"cpus": 2}, {"cpus": CpusConfig(boot=2)}),
    ({"cpus": "2,max=4"}, {"cpus": CpusConfig(boot=2, max=4)}),
    ({"cpus": {"boot": 4, "topology": (2, 2, 1, 1)}}, {"cpus": CpusConfig(boot=4, topology=(2, 2, 1, 1))}),
    ({"cpus": {"affinity": {0: [1, 2]}}}, {"cpus": CpusConfig(affinity={0: [1, 2]})}),
    ({"cpus": CpusConfig(boot=3)}, {"cpus": CpusConfig(boot=3)}),
    ({"memory": 16 * MIB}, {"memory": MemoryConfig(size=16 * MIB)}),
    ({"memory": "1G"}, {"memory": MemoryConfig(size=1024 * MIB)}),
    (
        {"memory": {"size": "1G", "shared": True, "file": Path("/dev/shm")}},
        {"memory": MemoryConfig(size=1024 * MIB, shared=True, file="/dev/shm")},
    ),
    ({"disks": ["/d"]}, {"disks": [DiskConfig(path="/d")]}),
    ({"disks": (Path("/a=b"),)}, {"disks": [DiskConfig(path="/a=b")]}),
    ({"disks": ["path=/d,readonly=on"]}, {"disks": [DiskConfig(path="/d", readonly=True)]}),
    ({"disks": [{"path": "/d", "direct": True}]}, {"disks": [DiskConfig(path="/d", direct=True)]}),
    ({"net": [{"fd": [3, 4]}]}, {"net": [NetConfig(fd=[3, 4])]}),
    ({"net": ["tap=tap0"]}, {"net": [NetConfig(tap="tap0")]}),
    ({"fs": [FsConfig(tag="t", sock="/s")]}, {"fs": [FsConfig(tag="t", sock="/s")]}),
    ({"balloon": {"size": "1M"}}, {"balloon": BalloonConfig(size=MIB)}),
    ({"serial": "file=/out"}, {"serial": SerialConfig(mode="file", file="/out")}),
    ({"serial": {"file": Path("/out")}}, {"serial": SerialConfig(mode="file", file="/out")}),
    ({"serial": "tty"}, {"serial": SerialConfig(mode="tty")}),
    ({"pci": False}, {"pci": False}),
    (
        {"kernel": Path("/k"), "cmdline": 'a="b c"'},
        {"payload": PayloadConfig(kernel="/k", cmdline='a="b c"')},
    ),
    ({"disks": None}, {}),
]


@pytest.mark.parametrize(("words", "expected"), GOOD, ids=lambda each: str(each)[:40])
def test_values_of_python_make_a_configuration(words: dict[str, Any], expected: dict[str, Any]) -> None:
    assert configure(**words) == VmConfig(**{"console": ConsoleConfig(mode="off")} | expected)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"disk": ["/d"]}, "disk is unknown: words are kernel, cmdline, initramfs, cpus,"),
    ({"cpus": 0}, "cpus.boot 0: it takes a whole number from 1 to 4096"),
    ({"cpus": True}, "cpus.boot True: it takes a whole number"),
    ({"cpus": 1.5}, r"cpus.boot 1\.5: it takes a whole number"),
    ({"cpus": {"boots": 1}}, "cpus.boots is unknown: keys are boot, max"),
    ({"cpus": DiskConfig()}, "cpus DiskConfig.*it takes a CpusConfig"),
    ({"memory": "much"}, "memory much: size takes a number of bytes"),
    ({"memory": {"size": -1}}, "memory.size -1: it takes a number of bytes"),
    ({"memory": 1}, "--memory size=1: size is at least 2M"),
    ({"disks": "/d"}, "disks '/d': it takes a list"),
    ({"disks": 3}, "disks 3: it takes a list"),
    ({"disks": [3]}, r"disks\[0\].path 3: it takes a path"),
    ({"disks": ["path=/d,speed=9"]}, r"disks\[0\] speed=9: there is no key speed"),
    ({"disks": ["/d", "/d"]}, "--disk path=/d: another disk is this image"),
    ({"net": [3]}, r"net\[0\] 3: it takes a NetConfig, a dict or the text of an option"),
    ({"fs": [{"sock": "/s"}]}, r"fs\[0\].tag is missing: it takes printable ASCII"),
    ({"pci": "perhaps"}, "pci 'perhaps': it takes on or off"),
    ({"kernel": b"/k"}, "payload.kernel b'/k': it takes a path"),
    ({"kernel": "/k", "cmdline": "a\nb"}, "payload.cmdline .*: it takes printable ASCII"),
    ({"serial": {"mode": "loud"}}, "serial.mode 'loud': it takes off, null"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=lambda each: str(each)[:40])
def test_what_makes_none_is_one_sentence(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        configure(**words)
    assert "\n" not in str(caught.value)


def test_all_of_the_model_has_a_word() -> None:
    assert set(vm_words()) | {"payload"} == set(VmConfig.fields)
    assert payload_words() == ["kernel", "cmdline", "initramfs"]

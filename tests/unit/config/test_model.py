"""Defaults of the model, and what they depend on."""

import os

import pytest

from pileus.config import model
from pileus.config.declare import Struct
from pileus.config.grammar import parse

STRUCTS = [value for value in vars(model).values() if isinstance(value, type) and issubclass(value, Struct)]


def test_the_defaults_are_the_reference_s() -> None:
    vm = model.VmConfig()
    assert (vm.cpus.boot, vm.cpus.max, vm.cpus.topology) == (1, 1, None)
    assert (vm.memory.size, vm.memory.file, vm.memory.shared, vm.memory.thp) == (512 << 20, None, False, True)
    assert (vm.payload.kernel, vm.payload.cmdline, vm.payload.initramfs) == (None, "", None)
    assert (vm.serial.mode, vm.console.mode, vm.rng.src) == ("null", "tty", "/dev/urandom")


def test_an_interface_has_a_queue_pair_for_each_descriptor() -> None:
    assert model.NetConfig().num_queues == 2
    assert model.NetConfig(fd=[3, 4]).num_queues == 4
    assert model.NetConfig(num_queues=8).num_queues == 8


def test_the_reference_s_empty_keys_are_defaults() -> None:
    assert parse(model.NetConfig, "--net", "tap=,mac=,ip=,mask=") == model.NetConfig()


def test_max_follows_boot() -> None:
    assert model.CpusConfig(boot=4).max == 4
    assert model.CpusConfig(boot=4, max=8).max == 8


def test_the_console_leaves_the_terminal_to_a_serial_port_that_has_it() -> None:
    assert model.VmConfig(serial=model.SerialConfig(mode="tty")).console.mode == "off"
    assert model.VmConfig(serial=model.SerialConfig(mode="pty")).console.mode == "tty"


def test_a_vm_shares_nothing_with_the_next() -> None:
    model.VmConfig().cpus.boot = 7
    assert model.VmConfig().cpus.boot == 1


def test_a_serial_port_has_one_path() -> None:
    assert model.SerialConfig(mode="file", file="/a").path == "/a"
    assert model.SerialConfig(mode="socket", socket="/b").path == "/b"
    assert model.SerialConfig().path is None


@pytest.mark.parametrize(
    ("uid", "sudo", "folder"),
    [(1000, "5", "/run/user/1000"), (0, "1000", "/run/user/1000"), (0, "", "/run"), (0, "../x", "/run")],
)
def test_the_default_api_socket(monkeypatch: pytest.MonkeyPatch, uid: int, sudo: str, folder: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("SUDO_UID", sudo)
    assert model.ApiSocketConfig().where == f"{folder}/pileus.{os.getpid()}"
    assert model.ApiSocketConfig(path="/a").where == "/a"


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_field_is_explained(struct: type[Struct]) -> None:
    for field in struct.fields.values():
        assert field.help
        assert field.help[0] not in " ."
        assert not field.help.endswith(".")


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_name_in_the_api_is_given_once(struct: type[Struct]) -> None:
    names = [field.wire or field.name for field in struct.fields.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_default_is_one_that_could_be_given(struct: type[Struct]) -> None:
    for field in struct.fields.values():
        if field.default is not None:
            assert field.kind.read(field.kind.write(field.default)) == field.default

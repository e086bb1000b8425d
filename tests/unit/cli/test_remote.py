"""pileus-remote, at a VMM that serves its API in this process; as it is installed, and on a terminal."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pileus.cli import remote_tables as tables
from pileus.cli.completion import SHELLS
from pileus.cli.remote import main
from pileus.cli.remote_verbs import VERBS
from tests.unit.api.conftest import api, fake_vms
from tests.unit.api.harness import Api, FakeVm

__all__ = ["api", "fake_vms"]
COMMAND = [sys.executable, str(Path(__file__).parents[3] / "bin" / "pileus-remote")]
CONFIG = {
    "payload": {"kernel": "/k", "cmdline": "quiet"},
    "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
    "disks": [{"path": "/d", "readonly": True}],
    "net": [{"tap": "tap0", "mac": "12:34:56:78:90:ab"}],
    "fs": [{"tag": "home", "socket": "/fs"}],
    "vhost_user_blk": [{"sock": "/blk"}],
    "balloon": {"size": 1 << 20},
    "vsock": {"cid": 3, "socket": "/v"},
    "serial": {"mode": "File", "file": "/out"},
    "console": {"mode": "Off"},
}

Remote = Callable[..., tuple[int, str, str]]


@pytest.fixture
def remote(api: Api, capfd: pytest.CaptureFixture[str]) -> Remote:
    """A function that runs the command here; returns status, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["--api-socket", str(api.path), *words])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def test_a_life_by_verbs(remote: Remote, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(json.dumps(CONFIG))
    assert remote("create", str(config)) == (0, "", "")
    for verb in ("boot", "pause", "resume", "reboot", "power-button", "nmi", "shutdown", "boot"):
        assert remote(verb) == (0, "", ""), verb
    assert json.loads(remote("info")[1])["state"] == "Running"
    assert json.loads(remote("counters")[1]) == {"_net0": {"rx_bytes": 1}}
    assert remote("delete") == (0, "", "")
    assert remote("shutdown-vmm") == (0, "", "")


def test_elsewhere_than_on_a_terminal_an_answer_is_a_line_of_json(remote: Remote) -> None:
    status, out, _ = remote("ping")
    assert status == 0
    assert out.count("\n") == 1
    assert json.loads(out)["pid"] == os.getpid()


def test_what_is_refused_is_one_sentence(remote: Remote) -> None:
    assert remote("pause") == (
        1,
        "",
        "pileus-remote: cannot pause a VM that is not created: it has to be Running.\n",
    )


def test_who_is_not_there_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--api-socket", f"{tmp_path}/none", "ping"]) == 1
    told = f"pileus-remote: cannot call vmm.ping at {tmp_path}/none: No such file or directory\n"
    assert capfd.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "a verb is needed"),
        (["ping"], "--api-socket PATH is needed"),
        (["--api-socket", "/s", "fly"], "invalid choice: 'fly'"),
        (["--api-socket", "/s", "ping", "pong"], "unrecognized arguments: pong"),
        (["--completion", "csh"], "invalid choice: 'csh'"),
        (["--api-socket", "/s", "create", "/no/config"], "/no/config: No such file"),
    ],
)
def test_words_without_meaning_are_one_sentence(
    words: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pileus-remote: ")
    assert sentence in err


@pytest.mark.parametrize("text", ["", "{", "[]", '"config"'])
def test_a_configuration_that_is_none_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "config").write_text(text)
    assert main(["--api-socket", "/s", "create", f"{tmp_path}/config"]) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"pileus-remote: the configuration in {tmp_path}/config: it ")
    assert err.count("\n") == 1


def test_the_configuration_comes_from_standard_input(api: Api) -> None:
    done = subprocess.run(
        [*COMMAND, "--api-socket", str(api.path), "create"],
        input=json.dumps(CONFIG),
        text=True,
        check=True,
        timeout=30,
    )
    assert done.returncode == 0
    assert api.client().get("vm.info")[1]["state"] == "Created"


def on_a_terminal(*words: str) -> str:
    """What the installed command prints there."""
    ours, its = pty.openpty()
    process = subprocess.Popen([*COMMAND, *words], stdout=its, stdin=subprocess.DEVNULL)
    os.close(its)
    told = b""
    while True:
        try:
            told += os.read(ours, 65536)
        except OSError:  # EIO: the last holder of the terminal is gone
            break
    os.close(ours)
    assert process.wait(30) == 0
    return told.decode().replace("\r\n", "\n")


def test_on_a_terminal_an_answer_is_a_table_unless_json_is_asked_for(api: Api) -> None:
    path = str(api.path)
    assert on_a_terminal("--api-socket", path, "ping").startswith("Build           pileus v")
    for words in (["--json", "ping"], ["ping", "--json"]):
        assert json.loads(on_a_terminal("--api-socket", path, *words))["pid"] == os.getpid()
    client = api.client()
    assert client.put("vm.create", CONFIG) == 204
    assert on_a_terminal("info", "--api-socket", path) == INFO
    assert client.put("vm.boot") == 204
    assert on_a_terminal("counters", "--api-socket", path) == COUNTERS


def test_a_terminal_sees_how_far_a_core_is(api: Api, fake_vms: list[FakeVm], tmp_path: Path) -> None:
    client = api.client()
    assert client.put("vm.create", CONFIG) == 204
    assert client.put("vm.boot") == 204
    fake_vms[0].waits = True
    ours, its = pty.openpty()
    words = ["--api-socket", str(api.path), "coredump", f"{tmp_path}/core"]
    process = subprocess.Popen([*COMMAND, *words], stderr=its, stdin=subprocess.DEVNULL)
    os.close(its)
    told = b""
    while b"coredump, 10 % of 100" not in told:
        told += os.read(ours, 4096)
    assert "Under way     coredump, 10 % of 100\n" in on_a_terminal("--api-socket", str(api.path), "info")
    fake_vms[0].dumps[f"{tmp_path}/core"].go.set()
    assert process.wait(30) == 0
    assert os.read(ours, 4096).endswith(b"\r\x1b[K"), "the line is gone again"
    os.close(ours)


INFO = """\
State         Created
vCPUs         2, at most 4
Memory        512M
Kernel        /k
Command line  quiet
Serial        File /out
Console       Off

DEVICE   NAME              WHAT
disk     _disk0            /d, readonly
net      _net0             tap0, 12:34:56:78:90:ab
fs       _fs0              home, /fs
blk      _vhost_user_blk0  /blk
balloon                    1M
vsock    _vsock0           cid 3, /v
"""
COUNTERS = """\
DEVICE  COUNTER   VALUE
_net0   rx_bytes      1
"""


def test_a_name_that_would_do_harm_to_a_terminal_is_shown_plain() -> None:
    assert tables.columns([("a\x1b[2J", 1)]) == "a\\x1b[2J  1"
    assert tables.columns([]) == ""


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("pileus-remote ")
    assert main(["--help"]) == 0
    told = capfd.readouterr().out
    assert all(verb.name in told for verb in VERBS)


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_learns_all_verbs(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", shell]) == 0
    told = capfd.readouterr().out
    assert all(verb.name in told for verb in VERBS)


def test_bash_completes_verbs_and_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    script = f"""
        eval "$({" ".join(COMMAND)} --completion bash)"
        COMP_WORDS=(pileus-remote po) COMP_CWORD=1; _pileus_remote; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(pileus-remote create conf) COMP_CWORD=2; _pileus_remote; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(pileus-remote --completion f) COMP_CWORD=2; _pileus_remote; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.split() == ["power-button", "config.json", "fish"]

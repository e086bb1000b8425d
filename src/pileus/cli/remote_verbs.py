"""What ``pileus-remote`` can ask for: one table, by the names of ch-remote."""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from pileus.cli import remote_tables as tables
from pileus.cli.remote_progress import Progress
from pileus.errors import ConfigError, HostError
from pileus.sdk.client import Client

STDIN = "-"


class Verb(NamedTuple):
    """``act`` gets the client and the argument, and returns what is to be printed, as JSON has it."""

    name: str
    help: str
    act: Callable[[Client, Any], Any]
    table: Callable[[Any], str] | None = None
    argument: str = ""
    argument_help: str = ""
    default: str | None = None  # of the argument; None: it is needed


def _put(call: str) -> Callable[[Client, Any], Any]:
    return lambda client, _: client.call("PUT", call)


def _get(call: str) -> Callable[[Client, Any], Any]:
    return lambda client, _: client.call("GET", call)


def _create(client: Client, path: str) -> None:
    client.create(_configuration(path))


def _coredump(client: Client, path: str) -> None:
    with Progress(client):
        client.coredump(path.removeprefix("file://"))


def _configuration(path: str) -> dict[str, Any]:
    try:
        if path == STDIN:
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        body = json.loads(text)
    except OSError as error:
        raise HostError("read the configuration in", path, error) from error
    except ValueError as error:
        raise ConfigError("the configuration in", path, f"it is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError("the configuration in", path, "it takes an object of JSON")
    return body


VERBS = (
    Verb("ping", "Ask who is there", _get("vmm.ping"), tables.ping),
    Verb("info", "Show configuration and state of the VM", _get("vm.info"), tables.info),
    Verb("counters", "Show what its devices have counted", _get("vm.counters"), tables.counters),
    Verb(
        "create",
        "Give the VMM the configuration of a VM",
        _create,
        argument="FILE",
        argument_help="JSON as vm.create takes it; - (the default) is standard input",
        default=STDIN,
    ),
    Verb("boot", "Boot the VM", _put("vm.boot")),
    Verb("pause", "Pause the VM", _put("vm.pause")),
    Verb("resume", "Let a paused VM go on", _put("vm.resume")),
    Verb("reboot", "End the VM without asking the guest, and boot it again", _put("vm.reboot")),
    Verb("shutdown", "End the VM without asking the guest", _put("vm.shutdown")),
    Verb("delete", "End the VM and forget its configuration", _put("vm.delete")),
    Verb("power-button", "Ask the guest to shut down", _put("vm.power-button")),
    Verb("nmi", "Send an NMI to each vCPU", _put("vm.nmi")),
    Verb(
        "coredump",
        "Write a core of the VM, for gdb or drgn",
        _coredump,
        argument="FILE",
        argument_help="a new file, by its path or as file:///path",
    ),
    Verb("cancel", "Give up the long operation that is under way", _put("vm.cancel")),
    Verb("shutdown-vmm", "Delete the VM and end pileus", _put("vmm.shutdown")),
)

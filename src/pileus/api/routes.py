"""What can be asked: one table, which the server follows and ``openapi`` describes.

Statuses: 200 with a body or 204 without; 400 for what the request says, 404 where there is no VM, 405 for
another method, 409 where the VM's state does not allow it, 500 where the host refuses. Every error has a
body, a list of sentences, outermost first.
"""

import json
import os

from pileus import __version__
from pileus.api import generations
from pileus.api.http import Request, Response
from pileus.config import wire
from pileus.config.check import check_vm
from pileus.config.model import CoredumpConfig
from pileus.config.release import COMPATIBLE
from pileus.errors import ConfigError, PileusError, StateError
from pileus.vmm import control
from pileus.vmm.control import Control, Outcome
from pileus.vmm.lifecycle import NONE
from pileus.vmm.operation import CancelledError
from pileus.vmm.vmm import Vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pileus.vmm.vmm import View

ROOT = "/api/v1/"
BUILD = f"pileus v{__version__}"
FEATURES = ("kvm", "io_uring")
SHOWN_CAUSES = 5


class Route:
    """``answer`` is called at once with the Control and returns the body; ``act``, with the VMM, in its turn.

    ``read`` makes of the request's body what ``act`` gets beside the VMM.
    """

    __slots__ = ("act", "answer", "errors", "help", "method", "name", "read", "request", "response")

    def __init__(
        self,
        method: str,
        name: str,
        help: str,
        *,
        answer: "Callable[[Control], Any] | None" = None,
        act: "Callable[..., Any] | None" = None,
        read: "Callable[[Any], Any] | None" = None,
        request: str = "",
        response: str = "",
        errors: tuple[int, ...] = (),
    ) -> None:
        self.method = method
        self.name = name
        self.help = help
        self.answer = answer
        self.act = act
        self.read = read
        self.request = request  # the schemas of the bodies
        self.response = response
        self.errors = errors

    def __call__(self, vmm: Control, request: Request, respond: "Callable[[Response], None]") -> None:
        """Answer ``request`` by ``respond``, now or later, on any thread."""
        if (answer := self.answer) is not None:
            respond(self._rendered(_tried(lambda: answer(vmm))))
            return
        act = self.act
        assert act is not None
        given: tuple[Any, ...] = ()  # a body that nobody asked for, such as {}, is ignored
        if (read := self.read) is not None:
            decoded = _tried(lambda: read(_json(request.body)))
            if decoded.error is not None:
                respond(self._rendered(decoded))
                return
            given = (decoded.result,)
        vmm.submit(lambda owner: act(owner, *given), lambda outcome: respond(self._rendered(outcome)))

    def _rendered(self, outcome: Outcome) -> Response:
        if outcome.error is not None:
            return _refusal(outcome.error)
        return Response(200, outcome.result) if self.response else Response(204)


def handle(vmm: Control, request: Request, respond: "Callable[[Response], None]") -> None:
    """Answer any request."""
    path = _path(request.target)
    methods = PATHS.get(path)
    if methods is None:
        respond(Response(404, [f"There is nothing at {path[:100]}."]))
    elif (route := methods.get(request.method)) is None:
        allowed = ", ".join(methods)
        respond(Response(405, [f"{path} takes {allowed}, not {request.method[:20]}."], (("Allow", allowed),)))
    else:
        route(vmm, request, respond)


def _path(target: str) -> str:
    """Clients write the path alone, or all of ``http://localhost/api/v1/…``."""
    if target.startswith("http://"):
        return "/" + target.removeprefix("http://").partition("/")[2]
    return target


def _json(body: bytes) -> "Any":
    """Raises ConfigError."""
    if not body:
        raise ConfigError("the body", "is missing", "it takes a JSON object")
    try:
        return json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ConfigError("the body", "is not JSON", reason)


def _unique(pairs: "list[tuple[str, Any]]") -> "dict[str, Any]":
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"there is no {name} in JSON")


def _tried(call: "Callable[[], Any]") -> Outcome:
    try:
        return Outcome(call())
    except PileusError as error:
        return Outcome(error=error)


def _refusal(error: Exception) -> Response:
    if isinstance(error, StateError):
        status = 404 if error.state == NONE else 409
    elif isinstance(error, CancelledError):
        status = 409
    else:
        status = 400 if isinstance(error, ConfigError) else 500
    if not isinstance(error, PileusError):
        return Response(500, [f"There is a bug in pileus, and its log has more: {error!r}."])
    sentences: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(sentences) < SHOWN_CAUSES:
        sentences.append(_sentence(str(cause)))
        cause = cause.__cause__
    return Response(status, sentences)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


# -- the table's functions ----------------------------------------------------------------------------


def _ping(_: Control) -> "dict[str, Any]":
    return {"build_version": BUILD, "version": COMPATIBLE, "pid": os.getpid(), "features": list(FEATURES)}


def _info(vmm: Control) -> "dict[str, Any]":
    return info(vmm.view)


def info(view: "View") -> "dict[str, Any]":
    """The answer of vm.info. Raises StateError where there is no VM."""
    if view.config is None:
        raise StateError("describe", NONE, "it has to be created first")
    config = generations.encode(view.config)
    for name, path in view.ptys.items():
        config[name]["file"] = path
    operation = view.operation
    under_way = operation and {"name": operation.name, "done": operation.done, "total": operation.total}
    return {
        "config": config,
        "state": view.state,
        "memory_actual_size": view.config.memory.size,
        "device_tree": None,
        **({"operation": under_way} if under_way else {}),
    }


def _read_config(body: "Any") -> "Any":
    config = generations.decode(body)
    check_vm(config)
    return config


def _read_coredump(body: "Any") -> "Any":
    return wire.decode(CoredumpConfig, body).path


def _openapi(_: Control) -> "dict[str, Any]":
    from pileus.api.openapi import document

    return document(ROUTES)


ROUTES = (
    Route("GET", "openapi.json", "This description", answer=_openapi, response="Anything"),
    Route("GET", "vmm.ping", "Whether the VMM is there, and which", answer=_ping, response="VmmPingResponse"),
    Route("PUT", "vmm.shutdown", "Delete the VM and end the process", act=control.shutdown),
    Route("GET", "vm.info", "Configuration and state", answer=_info, response="VmInfo", errors=(404,)),
    Route(
        "PUT",
        "vm.create",
        "Keep the configuration of a VM",
        act=control.create,
        read=_read_config,
        request="VmConfig",
        errors=(400, 409),
    ),
    Route("PUT", "vm.delete", "End the VM and forget its configuration", act=Vmm.delete),
    Route("PUT", "vm.boot", "Build the VM and let it run", act=Vmm.boot, errors=(400, 404, 409)),
    Route("PUT", "vm.pause", "Stop vCPUs and devices", act=Vmm.pause, errors=(404, 409)),
    Route("PUT", "vm.resume", "Let them go on", act=Vmm.resume, errors=(404, 409)),
    Route("PUT", "vm.shutdown", "End the VM without asking the guest", act=Vmm.shutdown, errors=(404, 409)),
    Route(
        "PUT",
        "vm.reboot",
        "End the VM without asking the guest, and boot it again",
        act=Vmm.reboot,
        errors=(400, 404, 409),
    ),
    Route(
        "GET",
        "vm.counters",
        "What the devices have counted",
        act=Vmm.counters,
        response="VmCounters",
        errors=(404, 409),
    ),
    Route(
        "PUT",
        "vm.power-button",
        "Ask the guest to shut down, by its ACPI power button",
        act=Vmm.press_power_button,
        errors=(404, 409),
    ),
    Route(
        "PUT",
        "vm.coredump",
        "Write a core of the VM to a new file, an ELF that debuggers open; the answer comes at its end",
        act=Vmm.coredump,
        read=_read_coredump,
        request="CoredumpConfig",
        errors=(400, 404, 409),
    ),
    Route(
        "PUT",
        "vm.cancel",
        "Give up the long operation that is under way, if there is one",
        act=Vmm.cancel,
        errors=(404, 409),
    ),
    Route("PUT", "vm.nmi", "Send an NMI to each vCPU", act=Vmm.send_nmi, errors=(404, 409)),
)
PATHS: dict[str, dict[str, Route]] = {}
for _route in ROUTES:
    PATHS.setdefault(ROOT + _route.name, {})[_route.method] = _route

"""The command ``pileus``: from its arguments to a checked configuration, which the VMM runs.

Exit status 0 after an orderly end, 1 with one sentence on standard error for whatever cannot be done.
"""

import os
import sys

from pileus import __version__, log
from pileus.cli.args import build, scan
from pileus.cli.options import HELP, OPTIONS, VERSION
from pileus.cli.summary import summary
from pileus.config.check import check
from pileus.config.model import ApiSocketConfig, VmConfig, VmmConfig
from pileus.errors import ConfigError, PileusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.cleanup import Closeable
    from pileus.vmm.control import Control

STDOUT, STDERR = 1, 2
SIGINT = 2


def main(arguments: list[str] | None = None, face: str = "pileus") -> int:
    """Run the command with ``arguments`` (default: the process's); return its exit status.

    ``face`` is the name that the command goes by, pileus or cloud-hypervisor.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments, face)
    except PileusError as error:
        say(STDERR, f"pileus: {log.one_line(str(error))}\n")
        return 1
    except KeyboardInterrupt:  # before the VMM takes signals over
        return 128 + SIGINT


def configure(given: dict[str, list[str]]) -> VmmConfig:
    """The configuration that the options ask for, checked; its VM may lack a kernel. Raises ConfigError."""
    config = build(VmmConfig, OPTIONS, given)
    config.vm = config.vm or VmConfig()
    if config.vm.payload.kernel is None and config.api_socket is None:
        config.api_socket = ApiSocketConfig()  # or nobody could make this process do anything
    check(config)
    return config


def _run(arguments: list[str], face: str) -> int:
    given = scan(arguments, OPTIONS)
    if HELP.flag in given:
        from pileus.cli.help import usage

        return say(STDOUT, usage())
    if VERSION.flag in given:
        return say(STDOUT, f"{face} {_version(face)}\n")
    config = configure(given)
    start_log(config.log_file, config.verbosity)
    say(STDOUT, summary(config))
    if config.vm is not None and config.vm.payload.kernel is None:
        config.vm = None  # nothing to boot: the API may bring a VM later
    from pileus.vmm.vmm import run

    return run(config, None if config.api_socket is None else _serve(config.api_socket))


def _version(face: str) -> str:
    if face == "pileus":
        return __version__
    from pileus.config.release import COMPATIBLE

    return f"v{COMPATIBLE}"  # with the v, as who starts it by that name expects


def _serve(config: "ApiSocketConfig") -> "Callable[[Control], Closeable]":
    """What opens the API; all that it needs is imported then."""

    def serve(vmm: "Control") -> "Closeable":
        from pileus.api import serve

        return serve.serve(config, vmm)

    return serve


def start_log(path: str | None, verbosity: int) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        log.setup(verbosity, path)
    except OSError as error:
        allowed = f"a file that can be written is needed: {os.strerror(error.errno or 0)}"
        raise ConfigError("--log-file", path, allowed) from error


def say(fd: int, text: str) -> int:
    """Write ``text`` as far as its reader wants it, and return the exit status 0."""
    data = text.encode()
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command ``pileus-remote``: leads the VM of a running pileus, by the verbs of ch-remote.

On a terminal an answer is a table; elsewhere, or with ``--json``, it is the JSON of the API on one line. Exit
status 0, or 1 with one sentence on standard error.
"""

import argparse
import json
import sys
from typing import NoReturn

from pileus import __version__, log
from pileus.cli import completion
from pileus.cli.remote_verbs import VERBS, Verb
from pileus.errors import PileusError
from pileus.sdk.client import Client

PROGRAM = "pileus-remote"
INTERRUPTED = 128 + 2  # SIGINT


class Parser(argparse.ArgumentParser):
    """One sentence and status 1 for what it does not understand, as all commands of pileus."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{PROGRAM}: {log.one_line(message)}; see --help\n")


def parser() -> Parser:
    """All that the command understands."""
    # Also after the verb; without a default there, which would undo what stands before it.
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--api-socket", metavar="PATH", help="the Unix socket of the API")
    common.add_argument("--json", action="store_true", help="print JSON, also on a terminal")
    whole = Parser(prog=PROGRAM, description="Lead the VM of a running pileus.", parents=[common])
    whole.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {__version__}")
    whole.add_argument(
        "--completion", choices=list(completion.SHELLS), help="print a script that completes words, and exit"
    )
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for verb in VERBS:
        one = verbs.add_parser(verb.name, help=verb.help, description=f"{verb.help}.", parents=[common])
        if verb.argument:
            one.add_argument(
                "argument",
                metavar=verb.argument,
                nargs="?" if verb.default is not None else None,
                default=verb.default,
                help=verb.argument_help,
            )
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run the command with ``arguments`` (default: the process's); return its exit status."""
    try:
        return _run(parser(), arguments)
    except SystemExit as end:  # --help, --version, or words that mean nothing
        return end.code if isinstance(end.code, int) else 1
    except PileusError as error:
        sys.stderr.write(f"{PROGRAM}: {log.one_line(str(error))}\n")
        return 1
    except BrokenPipeError:  # who reads has had enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(whole: Parser, arguments: list[str] | None) -> int:
    given = whole.parse_args(arguments)
    if given.completion:
        sys.stdout.write(completion.SHELLS[given.completion](PROGRAM, VERBS))
        return 0
    path = getattr(given, "api_socket", None)
    if given.verb is None:
        whole.error("a verb is needed")
    if path is None:
        whole.error("--api-socket PATH is needed")
    verb = next(verb for verb in VERBS if verb.name == given.verb)
    for_people = sys.stdout.isatty() and not getattr(given, "json", False)
    answer = verb.act(Client(path), getattr(given, "argument", None))
    if answer is not None:
        print(verb.table(answer) if for_people and verb.table else json.dumps(answer), flush=True)
    return 0


__all__ = ["Verb", "main", "parser"]

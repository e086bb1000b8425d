"""Scripts by which shells complete the words of a command with verbs."""

from collections.abc import Callable, Iterable
from typing import Protocol

OPTIONS = {  # option -> help; of these, --api-socket takes a file and --completion a shell
    "--api-socket": "the Unix socket of the API",
    "--json": "print JSON",
    "--completion": "print a script that completes words",
    "--version": "print the version",
    "--help": "print help",
}


class Verb(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def argument(self) -> str: ...


def bash(program: str, verbs: Iterable[Verb]) -> str:
    names = [verb.name for verb in verbs]
    files = "|".join(["--api-socket", *(verb.name for verb in verbs if verb.argument)])
    function = f"_{program.replace('-', '_')}"
    return f"""\
{function}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    COMPREPLY=()
    case $before in
        {files}) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$word")) ;;
        --completion) COMPREPLY=($(compgen -W "{" ".join(SHELLS)}" -- "$word")) ;;
        *) COMPREPLY=($(compgen -W "{" ".join([*names, *OPTIONS])}" -- "$word")) ;;
    esac
}}
complete -F {function} {program}
"""


def zsh(program: str, verbs: Iterable[Verb]) -> str:
    takes = {"--api-socket": ":path:_files", "--completion": f":shell:({' '.join(SHELLS)})"}
    options = " ".join(f"'{name}[{about}]{takes.get(name, '')}'" for name, about in OPTIONS.items())
    described = " ".join(f"'{verb.name}:{verb.help}'" for verb in verbs)
    return f"""\
#compdef {program}
local -a verbs=({described})
_arguments {options} '1:verb:{{_describe verb verbs}}' '2:file:_files'
"""


def fish(program: str, verbs: Iterable[Verb]) -> str:
    lines = [f"complete -c {program} -f"]
    takes = {"--api-socket": " -rF", "--completion": f" -x -a '{' '.join(SHELLS)}'"}
    for name, about in OPTIONS.items():
        lines.append(f"complete -c {program} -l {name.removeprefix('--')}{takes.get(name, '')} -d '{about}'")
    for verb in verbs:
        lines.append(f"complete -c {program} -n __fish_use_subcommand -a {verb.name} -d '{verb.help}'")
        if verb.argument:
            lines.append(f"complete -c {program} -n '__fish_seen_subcommand_from {verb.name}' -F")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[str, Iterable[Verb]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}

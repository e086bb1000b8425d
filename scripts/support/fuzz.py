"""Hostile input in bulk: ``scripts/fuzz [NAME [ARGUMENT…]]``; without a name all of fuzz/ by their defaults.

Each opens with its invariant, prints its seed first, and says at its end how many cases took how long.
"""

import subprocess

from support.host import PYTHON, ROOT, ScriptError, say
from support.setup import setup

FUZZ = ROOT / "fuzz"


def main(arguments: list[str]) -> int:
    names = sorted(path.stem for path in FUZZ.glob("*.py") if path.stem != "__init__")
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nNames: {', '.join(names)}. scripts/fuzz NAME --help says what its arguments are.")
        return 0
    if arguments and arguments[0] not in names:
        raise ScriptError(f"{arguments[0]}: there are {', '.join(names)}")
    setup("test")
    status = 0
    for name in arguments[:1] or names:
        say(f"--- {name}")
        command = [str(PYTHON), str(FUZZ / f"{name}.py"), *arguments[1:]]
        status |= subprocess.run(command, cwd=ROOT, check=False).returncode
    return 1 if status else 0

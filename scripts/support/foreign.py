"""Programs of other Debian releases than the machine's: unpacked beside the libraries they need.

They run under their own release's loader, so nothing of the host's system is touched, and no root is needed.
"""

import shlex
import shutil
from pathlib import Path

from support import apt
from support.host import CACHE, digest, only_one, say

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"


class Unpacked:
    """A folder in .cache with ``packages``, by release, and in its ``bin`` a script for each program."""

    def __init__(self, name: str, packages: dict[str, list[str]], programs: dict[str, str]) -> None:
        """``programs``: the path of each below the folder, by name."""
        self.folder = CACHE / name
        self._packages = packages
        self._programs = programs

    def program(self, name: str) -> Path:
        return self.folder / "bin" / name

    def fetch(
        self, *, variables: dict[str, str] | None = None, options: dict[str, list[str]] | None = None
    ) -> None:
        """Have all programs, each started with ``variables`` and its ``options``; what is there is kept."""
        recipe = digest([repr((self._packages, self._programs, variables, options)).encode()])
        stamp = self.folder / "recipe"
        with only_one(self.folder.name):
            if stamp.exists() and stamp.read_text() == recipe:
                return
            say(f"setup: fetching {', '.join(self._programs)} of Debian {', '.join(self._packages)}")
            shutil.rmtree(self.folder, ignore_errors=True)
            for suite, packages in self._packages.items():
                archive = apt.Archive(suite, CACHE / "apt" / suite)
                archive.update()
                archive.unpack(packages, self.folder)
            for name, path in self._programs.items():
                self._write_starter(name, path, variables or {}, (options or {}).get(name, []))
            stamp.write_text(recipe)

    def _write_starter(self, name: str, path: str, variables: dict[str, str], options: list[str]) -> None:
        words = [
            *(["env", *(f"{key}={value}" for key, value in variables.items())] if variables else []),
            self.folder / LOADER, "--library-path", self.folder / LIBRARIES, self.folder / path, *options,
        ]  # fmt: skip
        starter = self.program(name)
        starter.parent.mkdir(exist_ok=True)
        starter.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        starter.chmod(0o755)

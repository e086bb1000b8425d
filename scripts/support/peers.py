"""Programs of Debian 13 that tests talk to: unpacked into .cache/peers, beside the libraries they need.

They run under their own suite's loader, so nothing of the host's system is touched, and no root is needed.
.cache/peers/bin has a script that starts each.
"""

import shlex
import shutil
from pathlib import Path

from support import apt
from support.host import CACHE, digest, only_one, say

PEERS = CACHE / "peers"
SUITE = "trixie"
PACKAGES = ["virtiofsd", "passt", "libc6", "libgcc-s1", "libcap-ng0", "libseccomp2"]
PROGRAMS = {"virtiofsd": "usr/libexec/virtiofsd", "passt": "usr/bin/passt"}
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"


def fetch(*, refresh: bool = False) -> None:
    """Have all programs in .cache/peers; what is there is kept."""
    recipe = digest([Path(__file__).read_bytes()])
    stamp = PEERS / "recipe"
    with only_one("peers"):
        if not refresh and stamp.exists() and stamp.read_text() == recipe:
            return
        say(f"setup: fetching {', '.join(PROGRAMS)} of Debian {SUITE}")
        archive = apt.Archive(SUITE, CACHE / "apt" / SUITE)
        archive.update()
        shutil.rmtree(PEERS, ignore_errors=True)
        archive.unpack(PACKAGES, PEERS)
        for name, path in PROGRAMS.items():
            _write_starter(name, path)
        stamp.write_text(recipe)


def _write_starter(name: str, path: str) -> None:
    words = [PEERS / LOADER, "--library-path", PEERS / LIBRARIES, PEERS / path]
    starter = PEERS / "bin" / name
    starter.parent.mkdir(exist_ok=True)
    starter.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    starter.chmod(0o755)

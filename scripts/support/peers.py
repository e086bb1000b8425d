"""Programs of Debian 13 that tests talk to: unpacked into .cache/peers, beside the libraries they need.

They run under their own suite's loader, so nothing of the host's system is touched, and no root is needed:
``command("virtiofsd")`` is what to put before their arguments.
"""

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
    recipe = digest([SUITE.encode(), *(name.encode() for name in PACKAGES)])
    stamp = PEERS / "recipe"
    with only_one("peers"):
        if not refresh and stamp.exists() and stamp.read_text() == recipe:
            return
        say(f"setup: fetching {', '.join(PROGRAMS)} of Debian {SUITE}")
        archive = apt.Archive(SUITE, CACHE / "apt" / SUITE)
        archive.update()
        shutil.rmtree(PEERS, ignore_errors=True)
        archive.unpack(PACKAGES, PEERS)
        stamp.write_text(recipe)


def command(program: str) -> list[str]:
    """The beginning of a command line that starts ``program``."""
    path = PEERS / PROGRAMS[program]
    return [str(PEERS / LOADER), "--library-path", str(PEERS / LIBRARIES), str(path)]


def missing() -> list[Path]:
    """Those programs that were not fetched."""
    return [PEERS / path for path in PROGRAMS.values() if not (PEERS / path).exists()]

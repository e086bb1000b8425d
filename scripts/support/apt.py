"""Debian packages: what is installed, installing what is not, and reading another suite's archive.

No mirror is named anywhere: all sources are derived from the machine's own.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from support.host import ScriptError, run, say

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BACKPORTS = Path("/etc/apt/sources.list.d/pileus-backports.list")
QUIET = ["-qq", "-o", "Acquire::Retries=5", "-o", "Dpkg::Use-Pty=0"]


def codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return ""


def installed(package: str) -> str:
    """Return the installed version of ``package``, or the empty string."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Version}", package],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    status, _, version = done.stdout.partition(" ")
    return version.strip() if status == "ii" or status.startswith("i") else ""


def missing(packages: list[str]) -> list[str]:
    """Return those of ``packages`` that are absent; ``name>=10`` asks for an upstream version."""
    lacking = []
    for wish in packages:
        name, _, least = wish.partition(">=")
        major = re.match(r"(?:\d+:)?(\d+)", installed(name))
        if not major or (least and int(major[1]) < int(least)):
            lacking.append(wish)
    return lacking


def mirror() -> tuple[str, str]:
    """Return the URI of the machine's Debian archive and the option that names its keys."""
    form = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    lines = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).splitlines()
    suite = codename()
    for line in lines:
        uri, release, component = line.split("|")
        if release in (suite, "stable", "testing", "unstable", "sid") and component == "main":
            return uri, f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    raise ScriptError("no Debian archive is configured in /etc/apt, so nothing can be fetched")


def install(packages: list[str]) -> None:
    """Install what is missing of ``packages``, from backports where the suite's own is too old."""
    lacking = missing(packages)
    if not lacking:
        return
    if not shutil.which("apt-get"):
        raise ScriptError(
            f"these Debian packages, or your system's like of them, are needed: {' '.join(lacking)}"
        )
    if os.geteuid():
        raise ScriptError(f"run as root, or ask root to install: {' '.join(lacking)}")
    names = [wish.partition(">=")[0] for wish in lacking]
    from_backports = [
        wish.partition(">=")[0] for wish in lacking if ">=" in wish and codename() == "bookworm"
    ]
    if from_backports:
        _add_backports()
    say(f"setup: installing {' '.join(names)}")
    run(["apt-get", *QUIET, "update"])
    command = ["apt-get", *QUIET, "-y", "--no-install-recommends", "install"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    rest = [name for name in names if name not in from_backports]
    if rest:
        run([*command, *rest], env=environment)
    if from_backports:
        # -t lets the dependencies of a backport come from there as well.
        run([*command, "-t", f"{codename()}-backports", *from_backports], env=environment)


def _add_backports() -> None:
    suite = f"{codename()}-backports"
    listed = run(["apt-get", "indextargets", "--format", "$(RELEASE)", "Created-By: Packages"]).split()
    if suite in listed:
        return
    uri, option = mirror()
    say(f"setup: adding {suite} to apt's sources")
    BACKPORTS.write_text(f"deb {option}{uri} {suite} main\n")


class Archive:
    """One suite of the machine's mirror, read through lists of its own below ``directory``.

    Neither apt's lists nor dpkg's database of the host are touched, so that no root is needed.
    """

    def __init__(self, suite: str, directory: Path) -> None:
        self.suite = suite
        self.directory = directory

    def update(self) -> None:
        uri, option = mirror()
        for part in ("lists/partial", "cache/archives/partial"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        (self.directory / "sources.list").write_text(f"deb {option}{uri} {self.suite} main\n")
        run(["apt-get", *self._options(), "-qq", "update"])

    def depends(self, package: str) -> list[str]:
        """Return the first alternative of each package that ``package`` depends on."""
        text = run(["apt-cache", *self._options(), "show", "--no-all-versions", package])
        line = re.search(r"^Depends: (.*)$", text, re.M)
        return [re.split(r"[ |(]", part.strip())[0] for part in line[1].split(",")] if line else []

    def version(self, package: str) -> str:
        text = run(["apt-cache", *self._options(), "show", "--no-all-versions", package])
        found = re.search(r"^Version: (.*)$", text, re.M)
        return found[1] if found else ""

    def unpack(self, packages: list[str], target: Path) -> None:
        """Download ``packages``, check them against the signed lists, and unpack them into ``target``."""
        downloads = self.directory / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir()
        target.mkdir(parents=True, exist_ok=True)
        run(["apt-get", *self._options(), "-qq", "download", *packages], cwd=downloads)
        for package in sorted(downloads.glob("*.deb")):
            run(["dpkg", "-x", str(package), str(target)])
        shutil.rmtree(downloads)

    def _options(self) -> list[str]:
        settings = {
            "Dir::Etc::sourcelist": self.directory / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": self.directory / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self.directory / "cache",
            "APT::Sandbox::User": "root",  # the cache may lie where the user _apt cannot look
            "APT::Architecture": "amd64",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::Retries": "5",
        }
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

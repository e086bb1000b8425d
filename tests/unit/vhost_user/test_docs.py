"""The example of docs/vhost-user.md works as it stands there."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pileus.testing import FakeDriver
from pileus.vhost_user import server

ROOT = Path(__file__).parents[3]


def test_the_back_end_of_the_page_gives_zeroes(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/vhost-user.md").read_text()
    match = re.search(r"A back-end of yours.*?\n\n((?:    .*\n|\n)+)", page)
    assert match
    served: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *words: served.append(words))
    exec(compile(textwrap.dedent(match[1]), "docs/vhost-user.md", "exec"), {"__name__": "example"})
    ((device, path),) = served
    assert path == "/run/zeroes"
    driver = FakeDriver(device)
    head = driver.add([], [32])
    driver.kick()
    (used,) = driver.used()
    assert (used.length, driver.read(head)) == (32, bytes(32))
    driver.close()

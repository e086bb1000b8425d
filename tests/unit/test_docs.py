"""The snippets of docs/python.md run as they stand, and print what they say they do."""

import os
import re
from pathlib import Path

import pytest

from pileus.kvm.probe import OVERRIDE
from tests.unit import tiny
from tests.unit.api.conftest import real_api
from tests.unit.api.harness import Api

__all__ = ["real_api"]
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm")


@pytest.fixture
def names(real_api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv(OVERRIDE, "1")
    (tmp_path / "kernel").write_bytes(tiny.elf(tiny.SPIN))
    from pileus import VirtualMachine

    return {
        "kernel": str(tmp_path / "kernel"),
        "folder": str(tmp_path),
        "socket": str(real_api.path),
        "VirtualMachine": VirtualMachine,
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda each: each.strip().splitlines()[-1].strip()[:40])
def test_a_snippet_runs(snippet: str, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, str(PAGE), "exec"), names)
    told = capsys.readouterr().out.splitlines()
    expected = [match[1] for match in re.finditer(r"print\([^\n]*\)  # ([^\n]*)", snippet)]
    for sentence in expected:
        if sentence == "our own":
            assert str(os.getpid()) in told
        else:
            assert any(line.startswith(sentence.rstrip("…")) for line in told), (sentence, told)


def test_there_are_some() -> None:
    assert len(SNIPPETS) >= 5

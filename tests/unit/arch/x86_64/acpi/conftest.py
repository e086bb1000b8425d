"""iasl, the reference compiler and disassembler of ACPI tables."""

import shutil
import subprocess
from pathlib import Path

import pytest


class Iasl:
    """Runs iasl in one directory; what it compiles or decompiles without a complaint comes back."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def compile(self, source: str) -> bytes:
        """The AML of ASL terms, which may be of no use, without the table's header."""
        self._compile(f'DefinitionBlock ("", "DSDT", 6, "PILEUS", "TEST", 1)\n{{\n{source}\n}}\n')
        return self._aml()

    def round_trip(self, table: bytes) -> tuple[str, bytes]:
        """The disassembly of ``table``, and what it compiles to, to which iasl must have no remark."""
        self._path("t.aml").write_bytes(table)
        self._run("-d", "t.aml")
        source = self._path("t.dsl").read_text()
        output = self._compile(source)
        assert "0 Errors, 0 Warnings, 0 Remarks" in output, output
        return source, self._aml()

    def _compile(self, source: str) -> str:
        self._path("u.dsl").write_text(source)
        return self._run("-of", "-on", "-p", "u", "u.dsl")

    def _aml(self) -> bytes:
        return self._path("u.aml").read_bytes()[36:]

    def _path(self, name: str) -> Path:
        return self._directory / name

    def _run(self, *args: str) -> str:
        result = subprocess.run(
            ["iasl", *args], cwd=self._directory, capture_output=True, text=True, check=False
        )
        output = result.stdout + result.stderr
        assert not result.returncode, output
        return output


@pytest.fixture(scope="session")
def iasl(tmp_path_factory: pytest.TempPathFactory) -> Iasl:
    if shutil.which("iasl") is None:
        pytest.skip("iasl is absent (Debian: acpica-tools)")
    return Iasl(tmp_path_factory.mktemp("iasl"))

import pytest

from pileus.console.escape import Escape


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def escape(calls: list[str]) -> Escape:
    return Escape({ord("x"): lambda: calls.append("quit"), ord("h"): lambda: calls.append("help")})


CASES: dict[str, tuple[bytes, bytes, list[str]]] = {  # typed, sent, commands
    "plain": (b"ls -l\r", b"ls -l\r", []),
    "quit": (b"\x01x", b"", ["quit"]),
    "help between words": (b"a\x01hb", b"ab", ["help"]),
    "Ctrl-A twice": (b"\x01\x01", b"\x01", []),
    "Ctrl-A a": (b"\x01a!", b"\x01!", []),
    "another key": (b"\x01e", b"\x01e", []),
    "Ctrl-A twice, then x": (b"\x01\x01x", b"\x01x", []),
    "two commands": (b"\x01h\x01x", b"", ["help", "quit"]),
    "bytes above 127": ("\x01é".encode(), "\x01é".encode(), []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
def test_commands_are_taken_out(
    escape: Escape, calls: list[str], case: tuple[bytes, bytes, list[str]], whole: bool
) -> None:
    typed, sent, commands = case
    pieces = [typed] if whole else [bytes((byte,)) for byte in typed]
    assert b"".join(map(escape.filter, pieces)) == sent
    assert calls == commands

"""Each kind's own values."""

import pytest

from pileus.config.kinds import (
    Address,
    Choice,
    Count,
    Interface,
    Kind,
    Mac,
    Mapping,
    Mask,
    Path,
    Printable,
    Ranges,
    Times,
    Tuple,
)

TOPOLOGY = Tuple("threads", "cores", high=8)
CPUS = Ranges(16)
AFFINITY = Mapping(Count(0, 3), CPUS)
READ: list[tuple[Kind, str, object]] = [
    (Count(1, 3), " 3 ", 3),
    (Choice("raw", "qcow2"), "raw", "raw"),
    (Path(), "a b", "a b"),
    (Printable(4), "", ""),
    (Printable(4), "a~ ", "a~ "),
    (Times(), "2", 2),
    (TOPOLOGY, "2:4", (2, 4)),
    (CPUS, "3", [3]),
    (CPUS, "[3]", [3]),
    (CPUS, "[8,0-2,1]", [0, 1, 2, 8]),
    (AFFINITY, "[0@[0-3],1@[2,4]]", {0: [0, 1, 2, 3], 1: [2, 4]}),
    (AFFINITY, "[2@7]", {2: [7]}),
    (Interface(), "vmtap0", "vmtap0"),
    (Interface(), "a" * 15, "a" * 15),
    (Mac(), "2E:00:ff:0a:B0:01", "2e:00:ff:0a:b0:01"),
    (Address(), "192.168.249.1", "192.168.249.1"),
    (Address(), "fd00::1", "fd00::1"),
    (Mask(), "255.255.255.0", "255.255.255.0"),
    (Mask(), "0.0.0.0", "0.0.0.0"),
    (Mask(), "ffff:ffff::", "ffff:ffff::"),
]
REFUSED: list[tuple[Kind, str]] = [
    *((Count(1, 3), text) for text in ("", "0", "4", "-1", "x", "1.0")),
    *((Choice("raw", "qcow2"), text) for text in ("", "RAW", "raw ")),
    *((Path(), text) for text in ("", "a\0b")),
    *((Printable(4), text) for text in ("abcd", "\n", "\x7f", "é")),
    *((TOPOLOGY, text) for text in ("", "2", "2:4:1", "0:1", "2:9", "2:", "2x4")),
    *(
        (CPUS, text)
        for text in ("", "[]", "[", "]", "16", "3-1", "1-", "-1", "[[1]]", "1 2", "0-99999999999")
    ),
    *(
        (AFFINITY, text)
        for text in ("", "[]", "0@1", "[0]", "[0@1@2]", "[4@1]", "[0@1,0@2]", "[0@[1]", "[0@1,]")
    ),
    *((Interface(), text) for text in ("", "a" * 16, "é" * 8, "a b", "a/b", "..", "vmtap%d", "a\0")),
    *(
        (Mac(), text)
        for text in ("", "2e:00:00:00:00", "2e:00:00:00:00:0g", "2e-00-00-00-00-00", "1:2:3:4:5:6")
    ),
    *((Mac(), text) for text in ("01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00")),
    *((Address(), text) for text in ("", "192.168.1", "1.2.3.256", "fd00::g", "host", "1.2.3.4/24", "é")),
    *((Mask(), text) for text in ("", "255.0.255.0", "0.0.0.1", "24", "ffff::1")),
]


@pytest.mark.parametrize(("kind", "text", "value"), READ)
def test_a_value_is_read_and_written(kind: Kind, text: str, value: object) -> None:
    assert kind.read(text) == value
    assert kind.read(kind.write(value)) == value


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_anything_else_is_refused(kind: Kind, text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        kind.read(text)


def test_what_is_allowed_is_said() -> None:
    assert Choice("a", "b", "c").allowed == "a, b or c"
    assert TOPOLOGY.allowed == "THREADS:CORES, 2 numbers from 1 to 8"
    assert CPUS.allowed == "[N-N,N], numbers below 16"
    assert AFFINITY.allowed == (
        "[N@[N-N,N],...], a whole number from 0 to 3 (each once) @ [N-N,N], numbers below 16"
    )

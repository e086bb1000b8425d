"""Requests that no kernel sends: each fails alone, and nothing outside of the directory is touched."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pileus.fs import abi
from pileus.fs.session import HANDLERS
from tests.unit.fs.client import URGENT, Client, served

NUMBERS = st.one_of(
    st.integers(0, 8), st.sampled_from([(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 4096, 1 << 32])
)
NAMES = st.sampled_from([b"a", b"b", b"link", b"..", b".", b"", b"a/b", b"/etc", b"x" * 300, b"user.a"])
BODIES = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda numbers, names: b"".join(n.to_bytes(8, "little") for n in numbers) + b"\0".join(names),
        st.lists(NUMBERS, max_size=8),
        st.lists(NAMES, max_size=3),
    ),
)
REQUESTS = st.tuples(
    st.one_of(st.sampled_from(sorted(HANDLERS)), st.integers(0, 1 << 32 - 1)),
    st.one_of(st.integers(0, 6), NUMBERS),
    BODIES,
    st.sampled_from([0, 1, 8, 100, 4096, 1 << 16]),
    st.sampled_from([None, 0, 39, 41, 1 << 20, (1 << 32) - 1]),
    st.sampled_from([URGENT, 1]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=12))
def test_whatever_comes_the_next_request_is_served(
    requests: list[tuple[int, int, bytes, int, int | None, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("hostile")
    folder = base / "shared"
    folder.mkdir()
    (folder / "a").write_text("text")
    (folder / "link").symlink_to("../secret")
    (base / "secret").write_text("not for guests")
    before = sorted(os.listdir("/proc/self/fd"), key=int)
    umask = os.umask(0)
    _, driver, client = served(folder, locks=True)
    try:
        client.look_up("a")
        client.look_up("link")
        client.create("b")
        for opcode, node, body, room, length, queue in requests:
            _send(client, opcode, node, body, room, length, queue)
        client.begin()
        folder.joinpath("afterwards").touch()
        assert "afterwards" in client.names()
        assert (base / "secret").read_text() == "not for guests"
        assert sorted(os.listdir(base)) == ["secret", "shared"]
    finally:
        os.umask(umask)
        driver.close()
    assert sorted(os.listdir("/proc/self/fd"), key=int) == before


def _send(
    client: Client, opcode: int, node: int, body: bytes, room: int, length: int | None, queue: int
) -> None:
    client.unique += 1
    told = abi.IN_HEADER.size + len(body) if length is None else length
    header = abi.IN_HEADER.pack(told, opcode & 0xFFFFFFFF, client.unique, node, 0, 0, 1, 0)
    client.driver.add([header + body], [room] if room else [], queue=queue)
    client.driver.kick(queue)


@pytest.mark.parametrize("size", [0, 1, 39])
def test_half_a_header_is_given_back(tmp_path: Path, size: int) -> None:
    _, driver, client = served(tmp_path)
    head = driver.add([bytes(size)] if size else [], [100])
    driver.add([bytes(size)] if size else [], [100], queue=1)
    driver.kick(0)
    driver.kick(1)
    driver.wait(0)
    assert head >= 0
    assert client.names()
    driver.close()

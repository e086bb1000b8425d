"""A window in which files appear, against a slow twin."""

import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.memory._window import FileWindow

PAGE = 4096
PAGES = 8
SIZE = PAGES * PAGE


def content(window: FileWindow) -> bytes:
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(window.hva)
        return memory.read(window.size)


EDGES = st.one_of(
    st.integers(0, PAGES + 1).map(lambda page: page * PAGE),
    st.sampled_from([1, PAGE - 1, (1 << 63) - PAGE, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1]),
)
STEPS = st.lists(st.tuples(st.booleans(), EDGES, EDGES, EDGES, st.booleans()), max_size=12)


@given(steps=STEPS)
def test_whatever_is_asked_for_the_slow_twin_shows_the_same(
    steps: list[tuple[bool, int, int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = os.urandom(SIZE)
    path = tmp_path_factory.mktemp("window") / "file"
    path.write_bytes(data)
    twin = bytearray(SIZE)
    window = FileWindow(SIZE)
    fd = os.open(path, os.O_RDWR)
    try:
        for put, at, offset, length, writable in steps:
            right = length and not (offset | length) % PAGE and offset + length <= SIZE
            if put:
                right = right and not at % PAGE and at + length < 1 << 63
                # What lies behind the end of the file cannot be looked at; it is mapped all the same.
                if right and at + length > SIZE:
                    continue
            call = partial(window.map, fd, at) if put else window.unmap
            more = (writable,) if put else ()
            if not right:
                with pytest.raises(OSError, match=r"window|file"):
                    call(offset, length, *more)
                continue
            call(offset, length, *more)
            twin[offset : offset + length] = data[at : at + length] if put else bytes(length)
        assert content(window) == twin
        window.clear()
        assert content(window) == bytes(SIZE)
    finally:
        os.close(fd)
        window.close()


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    window = FileWindow(64 << 20)
    place = f"{window.hva:x}-"
    assert place in Path("/proc/self/maps").read_text()
    window.close()
    window.close()
    assert place not in Path("/proc/self/maps").read_text()
    with pytest.raises(OSError, match="not pages of a window"):
        window.unmap(0, PAGE)


@pytest.mark.parametrize("size", [0, 1, PAGE + 1])
def test_a_window_is_whole_pages(size: int) -> None:
    with pytest.raises(ValueError, match="window"):
        FileWindow(size)

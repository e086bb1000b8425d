"""A vector delivers when no mask holds it back; what came meanwhile is pending."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.pci.config_space import ConfigSpace
from pileus.pci.function import Function
from pileus.pci.msix import Msix

from .conftest import FakeRoutes

ADDRESS, DATA = 0xFEE01000, 0x4031
ENABLED, MASKED = 0x8000, 0xC000


@pytest.fixture
def msix(routes: FakeRoutes) -> Iterator[Msix]:
    msix = Msix(3, routes)
    yield msix
    msix.close()


def set_message(msix: Msix, index: int, mask: int = 0) -> None:
    for offset, value in enumerate((ADDRESS, 0, DATA + index, mask)):
        msix.table.write(16 * index + 4 * offset, 4, value)


def signal(msix: Msix, index: int) -> None:
    os.eventfd_write(msix.vectors[index].fd, 1)


def pending(msix: Msix) -> int:
    return msix.pba.read(0, 8)


def test_vectors_start_masked_and_the_function_disabled(msix: Msix, routes: FakeRoutes) -> None:
    assert [msix.table.read(16 * index + 12, 4) for index in range(3)] == [1, 1, 1]
    assert routes.attached == {}
    msix.set_control(ENABLED)
    assert routes.attached == {}


def test_an_unmasked_vector_delivers_its_message(msix: Msix, routes: FakeRoutes) -> None:
    msix.set_control(ENABLED)
    set_message(msix, 1)
    signal(msix, 1)
    assert pending(msix) == 0
    assert routes.delivered() == [(ADDRESS, DATA + 1)]


def test_a_masked_vector_is_pending_and_delivers_when_unmasked(msix: Msix, routes: FakeRoutes) -> None:
    msix.set_control(ENABLED)
    set_message(msix, 2, mask=1)
    signal(msix, 2)
    assert (pending(msix), routes.delivered()) == (4, [])
    msix.table.write(44, 4, 0)
    assert (pending(msix), routes.delivered()) == (0, [(ADDRESS, DATA + 2)])


def test_the_function_mask_holds_all_back(msix: Msix, routes: FakeRoutes) -> None:
    msix.set_control(MASKED)
    for index in range(3):
        set_message(msix, index)
        signal(msix, index)
    assert (pending(msix), routes.delivered()) == (7, [])
    msix.set_control(ENABLED)
    assert (pending(msix), len(routes.delivered())) == (0, 3)
    msix.set_control(0)
    assert routes.attached == {}


def test_a_message_may_change_while_masked(msix: Msix, routes: FakeRoutes) -> None:
    msix.set_control(ENABLED)
    set_message(msix, 0)
    msix.table.write(12, 4, 1)
    msix.table.write(8, 4, 0x99)
    msix.table.write(12, 4, 0)
    signal(msix, 0)
    assert routes.delivered() == [(ADDRESS, 0x99)]


def test_a_table_write_of_8_bytes_sets_two_words(msix: Msix, routes: FakeRoutes) -> None:
    msix.set_control(ENABLED)
    msix.table.write(0, 8, ADDRESS)
    msix.table.write(8, 8, DATA)
    signal(msix, 0)
    assert routes.delivered() == [(ADDRESS, DATA)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 47), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1), st.booleans()
        ),
        max_size=30,
    ),
    st.integers(0, 0xFFFF),
)
def test_no_access_fails(accesses: list[tuple[int, int, int, bool]], control: int) -> None:
    routes = FakeRoutes()
    msix = Msix(3, routes)
    msix.set_control(control)
    for offset, size, value, write in accesses:
        if offset + size > msix.table_size:
            continue  # the bus does not let it through
        if write:
            msix.table.write(offset, size, value & (1 << (8 * size)) - 1)
        assert 0 <= msix.table.read(offset, size) < 1 << (8 * size)
        if offset + size <= msix.pba_size:
            msix.pba.write(offset, size, value)
            assert 0 <= msix.pba.read(offset, size) < 1 << (8 * size)
    assert all(msix.table.read(16 * index + 12, 4) in {0, 1} for index in range(3))
    msix.close()
    assert (routes.attached, routes.given) == ({}, set())


def test_pending_bits_go_on_beyond_64_vectors(routes: FakeRoutes) -> None:
    msix = Msix(70, routes)
    assert (msix.table_size, msix.pba_size) == (1120, 16)
    signal(msix, 0)
    signal(msix, 69)
    assert (msix.pba.read(0, 8), msix.pba.read(8, 8), msix.pba.read(8, 1)) == (1, 32, 32)
    msix.close()


def test_the_capability_says_where_the_table_is_and_takes_the_control_word(
    msix: Msix, routes: FakeRoutes
) -> None:
    function = Function("test", ConfigSpace())
    msix.define(function, 0, 0x1000, 0x1800)
    config = function.config
    at = config.read(0x34, 1)
    assert (config.read(at, 1), config.read(at + 2, 2)) == (0x11, 2)
    assert (config.read(at + 4, 4), config.read(at + 8, 4)) == (0x1000, 0x1800)
    set_message(msix, 0)
    config.write(at + 3, 1, 0x80)
    assert len(routes.attached) == 1
    config.write(at, 4, 0xFFFFFFFF)
    assert routes.attached == {}
    assert config.read(at + 2, 2) == 0xC002


def test_a_state_keeps_messages_masks_and_what_is_pending(msix: Msix, routes: FakeRoutes) -> None:
    msix.set_control(ENABLED)
    set_message(msix, 0)
    set_message(msix, 1, mask=1)
    signal(msix, 1)
    state = msix.state()
    other = Msix(3, routes)
    other.restore(state)
    assert other.state() == state
    assert other.pba.read(0, 8) == 2
    other.table.write(28, 4, 0)
    assert routes.delivered() == [(ADDRESS, DATA + 1)]
    other.close()
    with pytest.raises(ValueError, match="not a state"):
        msix.restore({"control": 0, "entries": b"", "pending": []})

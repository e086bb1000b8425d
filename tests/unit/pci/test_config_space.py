"""Configuration space keeps what a driver may write, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.pci.capability import Capabilities
from pileus.pci.config_space import ConfigSpace

ACCESSES = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=30
)


def config() -> ConfigSpace:
    return ConfigSpace(vendor=0x1AF4, device=0x1042, class_code=0x018000, revision=1, subsystem=7)


def test_ids_and_class_are_where_a_driver_looks() -> None:
    space = config()
    assert space.read(0, 4) == 0x10421AF4
    assert space.read(8, 4) == 0x01800001
    assert space.read(0x2E, 2) == 7
    assert space.read(0x0E, 1) == 0  # type 0, one function


def test_ids_cannot_be_written() -> None:
    space = config()
    space.write(0, 4, 0xFFFFFFFF)
    assert space.read(0, 4) == 0x10421AF4


def test_the_command_register_keeps_its_bits_and_the_status_none() -> None:
    space = config()
    space.write(4, 4, 0xFFFFFFFF)
    assert space.read(4, 4) == 0x0546


def test_a_field_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="venodr"):
        ConfigSpace(venodr=1)


def test_hooks_hear_of_accesses_that_touch_their_range() -> None:
    space, heard = config(), []
    space.after_write(0x3C, 1, lambda offset, size: heard.append((offset, size)))
    space.before_read(0x3C, 1, lambda offset, size: space.set(0x3C, 1, 0x77))
    for offset, size in [(0x38, 4), (0x3B, 2), (0x3C, 1), (0x3D, 1)]:
        space.write(offset, size, 0)
    assert heard == [(0x3B, 2), (0x3C, 1)]
    assert space.read(0x3C, 1) == 0x77


@given(ACCESSES)
def test_no_access_changes_a_bit_that_is_not_writable(accesses: list[tuple[int, int, int]]) -> None:
    space = config()
    Capabilities(space).add(0x09, b"\1\2\3\4", b"\xf0\0\0\x0f")
    before, mask = bytes(space.data), bytes(space.mask)
    for offset, size, value in accesses:
        space.write(offset, size, value & (1 << (8 * size)) - 1)
        if offset + size > 256:
            assert space.read(offset, size) == (1 << (8 * size)) - 1
        else:
            fixed = int.from_bytes(mask[offset : offset + size], "little")
            assert (space.read(offset, size) ^ value) & fixed == 0
    assert all(not (old ^ new) & ~bits for old, new, bits in zip(before, space.data, mask, strict=True))
    assert len(space.data) == 256


def test_capabilities_are_a_list_that_ends() -> None:
    space = config()
    capabilities = Capabilities(space)
    added = [capabilities.add(0x09, bytes(length)) for length in (1, 14, 2)]
    assert added == [0x40, 0x44, 0x54]
    assert space.read(6, 2) & 0x10
    found, pointer = [], space.read(0x34, 1)
    while pointer:
        found.append(pointer)
        pointer = space.read(pointer + 1, 1)
    assert found == added


def test_too_many_capabilities_are_refused() -> None:
    capabilities = Capabilities(config())
    for _ in range(12):
        capabilities.add(0x09, bytes(14))
    with pytest.raises(ValueError, match="does not fit"):
        capabilities.add(0x09, bytes(14))


def test_a_state_brings_back_what_a_driver_wrote() -> None:
    space, other = config(), config()
    space.write(4, 2, 6)
    space.write(0x3C, 1, 9)
    other.restore(space.state())
    assert other.data == space.data
    with pytest.raises(ValueError, match="256 bytes"):
        other.restore(b"")

"""Sizes, counts and switches as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pileus.config import units

SIZES = {
    "0": 0,
    "512": 512,
    "1K": 1 << 10,
    "512M": 512 << 20,
    " 2G ": 2 << 30,
    "3T": 3 << 40,
    "18446744073709551615": (1 << 64) - 1,
}
NOT_SIZES = [
    *("", " ", "K", "1k", "1m", "1KB", "1KK", "1.5G", "-1", "+1", "0x10", "1_000", "1 K", "²", "٣", "1G1"),
    "18446744073709551616",
    "16777216T",
    "9" * 5000,
]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_size_is_read(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", NOT_SIZES, ids=lambda text: text[:20])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        units.parse_size(text)


@given(st.integers(0, units.SIZE_MAX))
def test_a_size_survives_writing_and_reading(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size


@given(st.integers(1, 1023), st.sampled_from(sorted(units.SUFFIXES)))
def test_a_round_size_is_written_with_its_suffix(number: int, suffix: str) -> None:
    assert units.format_size(units.parse_size(f"{number}{suffix}")) == f"{number}{suffix}"


@pytest.mark.parametrize(("text", "value"), units.SWITCHES.items())
def test_a_switch_is_read(text: str, value: bool) -> None:
    assert units.parse_switch(text) is value
    assert units.parse_switch(units.format_switch(value)) is value


@pytest.mark.parametrize("text", ["", "On", "yes", "1", "on off"])
def test_anything_else_is_no_switch(text: str) -> None:
    with pytest.raises(ValueError, match="neither on nor off"):
        units.parse_switch(text)

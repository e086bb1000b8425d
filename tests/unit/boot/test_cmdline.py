import pytest

from pileus.boot.cmdline import encode
from pileus.errors import ConfigError


def test_ends_with_a_nul() -> None:
    assert encode("console=ttyS0 root=/dev/vda1") == b"console=ttyS0 root=/dev/vda1\0"
    assert encode("") == b"\0"


@pytest.mark.parametrize("bad", ["a\nb", "a\0b", "a\tb", "caf\xe9", "\udcff", "\x7f"], ids=ascii)
def test_only_printable_ascii_is_allowed(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"^--cmdline .*printable ASCII"):
        encode(bad)


def test_has_room_for_its_nul_in_64_kib() -> None:
    assert len(encode("a" * 65535)) == 65536
    with pytest.raises(ConfigError, match="65536 characters, this kernel takes at most 65535"):
        encode("a" * 65536)


def test_is_no_longer_than_the_kernel_keeps() -> None:
    assert len(encode("a" * 2047, 2047)) == 2048
    with pytest.raises(ConfigError, match="2048 characters, this kernel takes at most 2047"):
        encode("a" * 2048, 2047)
    with pytest.raises(ConfigError, match="65535"):
        encode("a" * 65536, 1 << 31)


def test_an_error_shows_only_the_beginning() -> None:
    with pytest.raises(ConfigError) as caught:
        encode("a" * 100_000)
    assert len(str(caught.value)) < 200

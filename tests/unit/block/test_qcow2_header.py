"""What of a header is refused, and in which words."""

import struct
from pathlib import Path

import pytest

from pileus.block.qcow2_header import EXTENSION_FEATURE_NAMES, Header
from tests.unit.block.twin import create

MIB = 1 << 20


def change(offset: int, form: str, *values: int) -> tuple[int, bytes]:
    return offset, struct.pack(f">{form}", *values)


REFUSED = {
    "magic": (change(0, "I", 0), "not a QCOW2 image"),
    "version": (change(4, "I", 4), "version 4"),
    "version 1": (change(4, "I", 1), "version 1"),
    "small clusters": (change(20, "I", 8), "2^8 bytes"),
    "large clusters": (change(20, "I", 22), "2^22 bytes"),
    "absurd clusters": (change(20, "I", 0xFFFFFFFF), "2^4294967295"),
    "disk too large for its L1 table": (change(24, "Q", 1 << 40), "covers"),
    "disk beyond all bounds": (change(24, "Q", (1 << 64) - 1), "at most"),
    "AES": (change(32, "I", 1), "AES"),
    "LUKS": (change(32, "I", 2), "LUKS"),
    "unknown encryption": (change(32, "I", 7), "method 7"),
    "huge L1 table": (change(36, "I", 0xFFFFFFFF), "at most 33554432"),
    "L1 table inside a cluster": (change(40, "Q", 0x30200), "no place of a cluster"),
    "L1 table nowhere": (change(40, "Q", 0), "no place of a cluster"),
    "L1 table far away": (change(40, "Q", 0xFFFFFFFFFFFF0000), "no place of a cluster"),
    "refcount table inside a cluster": (change(48, "Q", 0x10001), "no place of a cluster"),
    "huge refcount table": (change(56, "I", 0xFFFF), "at most 8388608"),
    "no refcount table": (change(56, "I", 0), "no refcount table"),
    "many snapshots": (change(60, "I", 65537), "65537 snapshots"),
    "snapshots nowhere": (change(60, "I", 1), "no place of a cluster"),
    "external data": (change(72, "Q", 4), "external data file"),
    "subclusters": (change(72, "Q", 16), "extended L2"),
    "unknown feature": (change(72, "Q", 1 << 40), "bit 40"),
    "compression without its feature": (change(100, "IB", 112, 1), "contradicts"),
    "feature without a compression": (change(72, "Q", 8), "contradicts"),
    "wide refcounts": (change(96, "I", 7), "2^7 bits"),
    "short header": (change(100, "I", 96), "header length is 96"),
    "odd header": (change(100, "I", 105), "header length is 105"),
    "long header": (change(100, "I", 0x10008), "header length is 65544"),
    "long extension": (change(104, "II", 1, 0xFFFFFFF0), "extension 0x1 "),
    "backing name outside": (change(8, "QI", 0xFFF0, 17), "out of bounds"),
    "backing name too long": (change(8, "QI", 0x200, 1024), "out of bounds"),
    "backing name far away": (change(8, "QI", (1 << 64) - 1, 5), "out of bounds"),
    "backing name with a zero": (change(8, "QI", 0x200, 3), "zero byte"),
}


@pytest.fixture
def image(tmp_path: Path) -> bytearray:
    return bytearray(create(tmp_path / "image", 64 * MIB).read_bytes()[:65536])


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_a_bad_header_is_refused_in_words(image: bytearray, row: tuple[tuple[int, bytes], str]) -> None:
    (offset, data), words = row
    image[offset : offset + len(data)] = data
    with pytest.raises(ValueError, match=r"^(it|its) ") as error:
        Header(bytes(image))
    assert words in str(error.value)


def test_a_header_may_be_cut_anywhere(image: bytearray) -> None:
    for length in range(104):
        with pytest.raises(ValueError, match=r"not a QCOW2 image|cut off"):
            Header(bytes(image[:length]))


def test_an_unknown_feature_is_named_as_the_image_names_it(tmp_path: Path) -> None:
    name = b"\0\x28" + b"quantum sectors".ljust(46, b"\0")
    extension = struct.pack(">II", EXTENSION_FEATURE_NAMES, len(name)) + name
    path = create(tmp_path / "image", MIB, features=(1 << 40, 0, 0), extensions=extension)
    with pytest.raises(ValueError, match="bit 40, 'quantum sectors'"):
        Header(path.read_bytes())


@pytest.mark.parametrize("version", [2, 3])
def test_a_backing_file_and_its_format_are_read(tmp_path: Path, version: int) -> None:
    path = create(tmp_path / "image", MIB, version=version, backing="../base", backing_format="raw")
    header = Header(path.read_bytes())
    assert (header.backing_path, header.backing_format) == ("../base", "raw")


def test_version_2_has_refcounts_of_16_bits_and_no_features(tmp_path: Path) -> None:
    header = Header(create(tmp_path / "image", MIB, version=2).read_bytes())
    assert (header.refcount_order, header.length, header.incompatible) == (4, 72, 0)

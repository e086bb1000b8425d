"""pileus-blk under front-ends that nobody here wrote: libblkio, QEMU's tools on it, and QEMU itself."""

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peer.blkio import LIBRARY, blkio
from tests.peer.vhost_user import PROGRAMS, missing
from tests.unit.vhost_user.commands import Process

QEMU = "qemu-system-x86_64"
needs_blkio = pytest.mark.skipif(not LIBRARY.exists(), reason="no libblkio: run scripts/setup test")
needs_tools = pytest.mark.skipif(missing("qemu-io"), reason="no qemu-io of Debian 13: run scripts/setup test")
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}: run scripts/setup test")

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096
QUEUES = 4


@pytest.fixture(params=["raw", "raw direct", "qcow2"])
def backend(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    kind, _, direct = request.param.partition(" ")
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, str(image), str(SIZE)], check=True)
    keys = f"path={image},image_type={kind},num_queues={QUEUES},direct={'on' if direct else 'off'}"
    with Process("pileus-blk", ["--block-backend", keys], tmp_path / "socket") as process:
        yield process
        assert process.end() == 0
    if kind == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)


def pattern(block: int, count: int) -> bytes:
    return struct.pack("<II", block, count) * (BLOCK // 8)


@needs_blkio
def test_libblkio_reads_what_it_wrote_in_any_order_on_any_queue(backend: Process) -> None:
    chance, depth = random.Random(1), 32
    with blkio(backend.socket, QUEUES) as disk:
        assert disk.capacity == SIZE
        written: dict[int, int] = {}
        for count in range(1, 9):
            blocks = chance.sample(range(SIZE // BLOCK), depth * QUEUES)
            for tag, block in enumerate(blocks):
                place = tag * BLOCK
                disk.fill(place, pattern(block, count))
                disk.write(tag % QUEUES, block * BLOCK, place, BLOCK, tag)
                written[block] = count
            for queue in range(QUEUES):
                assert all(result == 0 for _, result in disk.complete(queue, depth, depth))
        disk.flush(0, 7)
        assert disk.complete(0, 1, 1) == [(7, 0)]
        left = list(written.items())
        chance.shuffle(left)
        while left:
            some, left = left[: depth * QUEUES], left[depth * QUEUES :]
            for tag, (block, _) in enumerate(some):
                disk.read(tag % QUEUES, block * BLOCK, tag * BLOCK, BLOCK, tag)
            for queue in range(QUEUES):
                due = len(range(queue, len(some), QUEUES))
                if due:
                    assert all(result == 0 for _, result in disk.complete(queue, due, due))
            for tag, (block, count) in enumerate(some):
                assert disk.held(tag * BLOCK, BLOCK) == pattern(block, count)


@needs_blkio
def test_libblkio_reads_and_writes_in_a_row(backend: Process) -> None:
    length = MIB
    with blkio(backend.socket) as disk:
        for start in range(0, SIZE // 4, length):
            disk.fill(0, struct.pack("<Q", start) * (length // 8))
            disk.write(0, start, 0, length, 1)
            assert disk.complete(0, 1, 1) == [(1, 0)]
        for start in range(0, SIZE // 4, length):
            disk.read(0, start, length, length, 1)
            assert disk.complete(0, 1, 1) == [(1, 0)]
            assert disk.held(length, length) == struct.pack("<Q", start) * (length // 8)
        assert disk.capacity == SIZE


@needs_tools
def test_qemu_s_tools_bench_and_verify(backend: Process) -> None:
    options = ["--image-opts", f"driver=virtio-blk-vhost-user,path={backend.socket},cache.direct=on"]
    for more in (["-d", "64", "-s", "4096"], ["-d", "4", "-s", "131072", "-w"]):
        words = [str(PROGRAMS / "qemu-img"), "bench", "-c", "500", *more, *options]
        subprocess.run(words, check=True, timeout=60, capture_output=True)
    commands = (
        "write -P 0x5a 1M 3M", "read -P 0x5a 2M 1M", "flush", "write -z 1M 1M", "read -P 0 1M 1M",
        "discard 2M 1M", "read -P 0x5a 3M 1M", "aio_write -P 1 8M 64k", "aio_flush", "read -P 1 8M 64k",
    )  # fmt: skip
    words = [str(PROGRAMS / "qemu-io"), *(word for each in commands for word in ("-c", each)), *options]
    done = subprocess.run(words, check=True, timeout=60, capture_output=True, text=True)
    assert "failed" not in done.stdout + done.stderr


# Loaded by the firmware to 0x7c00: reads sector 1 to 0x8000, writes it to sector 2, and says so on COM1.
BOOT_SECTOR = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cfb"  # cli; segments 0; sp 0x7c00; sti
    "be607c"  # mov si, packet: read
    "b442" "cd13" "722a"  # int 13h, ah 42h: extended read; jc fail
    "c706687c0200"  # the packet's sector becomes 2
    "be607c" "b443" "30c0" "cd13" "721b"  # extended write; jc fail
    "be707c"  # mov si, text
)  # fmt: skip


def boot_sector() -> bytes:
    """As above, assembled by hand; the text that ends in 0 at 0x7c70, a packet at 0x7c60."""
    code = bytearray(BOOT_SECTOR)
    code += bytes.fromhex("ac84c07408baf803eeebf5")  # lodsb; test; jz; mov dx,3f8; out; loop
    while len(code) < 0x60:
        code += b"\xf4"  # hlt
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, 1)
    text = b"pileus-blk was read and written\r\n\0"
    return bytes(code + packet + text).ljust(510, b"\0") + b"\x55\xaa"


@needs_qemu
def test_qemu_s_firmware_boots_from_it_and_writes_to_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    secret = random.Random(3).randbytes(512)
    image.write_bytes((boot_sector() + secret).ljust(4 * MIB, b"\0"))
    with Process("pileus-blk", ["--backend", f"path={image},image_type=raw"], tmp_path / "socket") as backend:
        words = [
            QEMU, "-M", "q35,accel=tcg", "-m", "128", "-display", "none", "-nodefaults", "-serial", "stdio",
            "-object", "memory-backend-memfd,id=m,size=128M,share=on", "-numa", "node,memdev=m",
            "-chardev", f"socket,id=c,path={backend.socket}",
            "-device", "vhost-user-blk-pci,chardev=c,bootindex=1",
        ]  # fmt: skip
        qemu = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert qemu.stdout is not None
        try:
            seen = b""
            while b"read and written" not in seen and (data := os.read(qemu.stdout.fileno(), 4096)):
                seen += data
            assert b"pileus-blk was read and written" in seen
        finally:
            qemu.kill()
            qemu.wait()
            qemu.stdout.close()
        assert backend.end() == 0
    assert image.read_bytes()[1024:1536] == secret

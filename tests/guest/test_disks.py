"""virtio-blk with guests on it: what they write is there, in every kind of image and on both transports."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.guest.conftest import NewNetwork, StartGuest, StartSystem
from tests.guest.guest import TRIXIE_PVH, Guest, Kernel
from tests.guest.machine import MIB, PATTERN, PATTERN_AT, WRITABLE, Machine
from tests.guest.system import segment

pytestmark = pytest.mark.needs("--disk")

# A file system is made, filled, checked, read again from the disk alone.
FILE_SYSTEM = """
mkfs.ext4 -q -F {device}
mkdir -p /mnt/{name}
mount {device} /mnt/{name}
cd /mnt/{name}
head -c 12M /dev/urandom >one
cat one one >two
for count in $(seq 200); do echo $count >small$count; done
rm small1??
fstrim /mnt/{name} || true
sha256sum one two small* >/tmp/{name}.sums
cd /
umount /mnt/{name}
e2fsck -f -n {device} >/dev/null
echo 3 >/proc/sys/vm/drop_caches
mount -o ro {device} /mnt/{name}
cd /mnt/{name}
sha256sum --quiet -c /tmp/{name}.sums
wc -l </tmp/{name}.sums
cd /
umount /mnt/{name}
"""
HAMMER_SECONDS = 60
HAMMER_DISKS = {"a": "", "b": ",num_queues=8", "c": ",direct=on", "d": ",num_queues=4,queue_size=64"}


@pytest.mark.needs("--balloon", "--net")
class TestOneOfEach:
    @pytest.mark.parametrize("name", WRITABLE)
    def test_a_file_system_holds_what_was_written_to_it(self, machine: Machine, name: str) -> None:
        files = machine.check(FILE_SYSTEM.format(device=machine.device(name), name=name))
        assert int(files) == 102  # one, two, small1 to small99, small200
        if machine.image(name).suffix == ".img":
            subprocess.run(
                ["/sbin/e2fsck", "-f", "-n", str(machine.image(name))], check=True, capture_output=True
            )

    def test_an_image_shows_what_its_backing_file_holds_and_leaves_that_alone(self, machine: Machine) -> None:
        base = machine.folder / "base.img"
        before = hashlib.sha256(base.read_bytes()).hexdigest()
        device = machine.device("backed")
        seen = machine.check(
            f"tail -c +{PATTERN_AT + 1} {device} | head -c {len(PATTERN)} | sha256sum", pipefail=False
        )
        assert seen.split()[0] == hashlib.sha256(PATTERN).hexdigest()
        machine.check(
            f"echo news | dd of={device} bs=512 seek={PATTERN_AT // 512} conv=sync,fsync status=none"
        )
        assert (
            machine.check(f"dd if={device} bs=512 skip={PATTERN_AT // 512} count=1 status=none | head -c 4")
            == "news"
        )
        assert hashlib.sha256(base.read_bytes()).hexdigest() == before

    def test_a_read_only_disk_can_be_read_and_not_written(self, machine: Machine) -> None:
        device = machine.device("readonly")
        before = machine.image("readonly").read_bytes()
        machine.check(f"mkdir -p /mnt/readonly; mount -o ro {device} /mnt/readonly")
        assert machine.check(f"cat /mnt/readonly/foo; blockdev --getro {device}") == "bar\n1"
        machine.check("umount /mnt/readonly")
        assert machine.run(f"dd if=/dev/zero of={device} bs=4k count=1 conv=fsync").returncode != 0
        assert machine.image("readonly").read_bytes() == before

    def test_a_disk_has_a_queue_per_cpu_up_to_what_was_asked_for(self, machine: Machine) -> None:
        count = machine.check(
            f"ls -d /sys/block/$(basename $(readlink {machine.device('queues')}))/mq/* | wc -l"
        )
        assert int(count) == 2  # the guest has two CPUs, the disk four queues

    def test_discard_and_write_zeroes_free_the_blocks_of_the_image(self, machine: Machine) -> None:
        device, image = machine.device("holes"), machine.image("holes")
        full = _allocated(image)
        machine.check(f"blkdiscard -o $((16 << 20)) -l $((16 << 20)) {device}")
        assert _allocated(image) <= full - 16 * MIB
        machine.check(f"fallocate -p -o $((40 << 20)) -l $((8 << 20)) {device}")
        assert _allocated(image) <= full - 24 * MIB
        machine.check(f"blkdiscard -z -o $((56 << 20)) -l $((1 << 20)) {device}; sync {device}")
        data = image.read_bytes()
        for start, end in ((16, 32), (40, 48), (56, 57)):
            assert not any(data[start * MIB : end * MIB])
        for start, end in ((0, 16), (32, 40), (48, 56), (57, 64)):
            assert data[start * MIB : end * MIB].count(0xA5) == (end - start) * MIB


def _allocated(path: Path) -> int:
    """Return the bytes that the image takes on the host's disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # XFS counts blocks that it holds in reserve until then
    finally:
        os.close(descriptor)
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize("pci", ["on", "off"])
def test_sixteen_disks_at_once_each_with_its_own_data(
    start: StartGuest, folder: Path, tmp_path: Path, pci: str
) -> None:
    count = 16
    disks = [folder / f"disk{number}" for number in range(count)]
    for number, path in enumerate(disks):
        path.write_bytes(bytes([number + 1]) * MIB)
    script = """
for disk in /sys/block/vd*; do
    name=${disk##*/}
    echo "disk=$(cat $disk/serial) $(cat $disk/size) $(head -c 65536 /dev/$name | sha256sum | cut -c 1-64)"
    (cat $disk/serial; echo) | dd of=/dev/$name bs=512 seek=1024 conv=sync,fsync 2>/dev/null &
done
wait
"""
    guest: Guest = start(
        "--pci", pci, "--disk", *(f"path={path},serial=number{n}" for n, path in enumerate(disks)),
        do="script", cmdline="console=ttyS0 quiet pileus.modules=virtio",
        initramfs=segment(script, tmp_path, TRIXIE_PVH.initramfs),
    )  # fmt: skip
    text = guest.expect(r"script=\d+")
    assert text.endswith("script=0")
    assert guest.wait() == 0
    seen = sorted(line.split("=")[1].split() for line in text.splitlines() if line.startswith("disk="))
    wanted = [
        [f"number{n}", str(MIB // 512), hashlib.sha256(bytes([n + 1]) * 65536).hexdigest()]
        for n in range(count)
    ]
    assert seen == sorted(wanted)
    for number, path in enumerate(disks):
        assert path.read_bytes()[512 * 1024 :].startswith(f"number{number}".encode())


@pytest.mark.parametrize(
    ("suite", "pci"),  # trixie is the kernel of all others
    [
        ("bullseye", "on"),
        ("bookworm", "on"),
        ("sid", "off"),
        pytest.param("bullseye", "off", marks=pytest.mark.long),
        pytest.param("bookworm", "off", marks=pytest.mark.long),
        pytest.param("sid", "on", marks=pytest.mark.long),
    ],
)
@pytest.mark.needs("--net")
def test_other_kernels_have_a_disk_and_a_network(
    start: StartGuest, network: NewNetwork, folder: Path, tmp_path: Path, suite: str, pci: str
) -> None:
    net, image = network(), folder / "disk"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    script = f"""
set -e
ip link set eth0 up
ip addr add {net.guest}/24 dev eth0
ping -c 2 -w 20 {net.host}
ping -c 1 -w 20 -s 1400 {net.host}
/bin/mke2fs -q -t ext4 /dev/vda  # by its path, else the shell takes its own
mkdir /mnt
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/data bs=1M count=4
sha256sum /mnt/data >/tmp/sums
umount /mnt
e2fsck -f -n /dev/vda
mount -t ext4 /dev/vda /mnt
sha256sum -c /tmp/sums
umount /mnt
"""
    kernel = Kernel(suite)
    if not kernel.path.exists():
        pytest.skip(f"no kernel of {suite}: scripts/guests says why")
    guest: Guest = start(
        "--pci", pci, "--disk", f"path={image}", "--net", net.option,
        kernel=kernel, do="script", cmdline="console=ttyS0 quiet pileus.modules=virtio",
        initramfs=segment(script, tmp_path, kernel.initramfs, tools=True),
    )  # fmt: skip
    text = guest.expect(r"script=\d+")
    assert text.endswith("script=0"), text
    assert guest.wait() == 0
    subprocess.run(["/sbin/e2fsck", "-f", "-n", str(image)], check=True, capture_output=True)


@pytest.mark.long
@pytest.mark.needs("--net")
def test_eight_vcpus_hammer_four_disks_for_a_minute_and_read_what_they_wrote(
    debian: StartSystem, folder: Path
) -> None:
    for name in HAMMER_DISKS:
        with (folder / name).open("wb") as file:
            file.truncate(128 * MIB)
    system = debian(
        cpus="8",
        memory="size=1G",
        disks=tuple(f"path={folder / name},serial={name}{keys}" for name, keys in HAMMER_DISKS.items()),
    )
    system.settle()
    queues = [
        int(
            system.check(
                f"ls -d /sys/block/$(basename $(readlink /dev/disk/by-id/virtio-{name}))/mq/* | wc -l"
            )
        )
        for name in HAMMER_DISKS
    ]
    assert queues == [1, 8, 1, 4]
    # Two jobs a disk, each in its half, write for the minute and read back what they wrote 64 blocks ago.
    common = (
        f"--rw=randwrite --bsrange=4k-64k --ioengine=libaio --direct=1 --iodepth=16 --size=50% --numjobs=2 "
        f"--offset_increment=50% --time_based --runtime={HAMMER_SECONDS} --verify=crc32c --verify_fatal=1 "
        f"--verify_backlog=64 --verify_backlog_batch=32 --end_fsync=1 --minimal"
    )
    jobs = " ".join(f"--name={name} --filename=/dev/disk/by-id/virtio-{name}" for name in HAMMER_DISKS)
    before = time.monotonic()
    done = system.run(f"fio {common} {jobs}", timeout=HAMMER_SECONDS + 400)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert time.monotonic() - before >= HAMMER_SECONDS
    assert not system.run("dmesg -l err,crit,alert,emerg | grep -i 'error\\|stall\\|hung'").stdout
    assert system.power_off() == 0


def test_a_bad_sector_of_the_image_is_an_error_of_the_guest_and_nobody_dies(
    start: StartGuest, folder: Path, tmp_path: Path
) -> None:
    image = folder / "disk"
    image.write_bytes(b"x" * (4 * MIB))
    script = """
read_block() { dd if=/dev/vda bs=64k skip=$1 count=1 of=/dev/null 2>/dev/null; }
read_block 0 && echo "it can be cut now"
while read_block 40; do sleep 1; echo 3 >/proc/sys/vm/drop_caches; done
echo 3 >/proc/sys/vm/drop_caches
read_block 0 && echo "the start is still there"
"""
    guest: Guest = start(
        "--disk", f"path={image}", do="script", cmdline="console=ttyS0 quiet pileus.modules=virtio",
        initramfs=segment(script, tmp_path, TRIXIE_PVH.initramfs),
    )  # fmt: skip
    guest.expect("it can be cut now")
    os.truncate(image, MIB)
    guest.expect("the start is still there")
    assert guest.wait() == 0

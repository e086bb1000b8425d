"""Files as persistent memory: what may be one, where it goes, and what becomes of it."""

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pileus.arch.x86_64 import layout
from pileus.config.model import PmemConfig, VmConfig
from pileus.errors import ConfigError, HostError, PileusError
from pileus.kvm import Kvm
from pileus.memory import GuestMemory
from pileus.virtio.devices.pmem import Pmem
from pileus.vm import persistent
from pileus.vm.builder import build
from pileus.vm.vcpu import FAILURE, Event
from pileus.vm.vm import Vm
from tests.unit import tiny
from tests.unit.vm.test_builder import IDLE, FailsAt, ignore

MIB, GIB = 1 << 20, 1 << 30
SIZE = 4 * MIB


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pmem"
    path.write_bytes(b"\x11" * SIZE)
    return path


@pytest.fixture
def config(tmp_path: Path, file: Path) -> VmConfig:
    config = tiny.config(tmp_path, tiny.POWER_OFF)
    config.pmem = [PmemConfig(file=str(file))]
    return config


def pmems(vm: Vm) -> list[Pmem]:
    return [device for device in vm.devices if isinstance(device, Pmem)]


def table(memory: GuestMemory, signature: bytes) -> bytes:
    """An ACPI table that the XSDT lists, or nothing."""
    (xsdt,) = struct.unpack_from("<Q", memory.read(layout.ACPI_TABLES, 36), 24)
    (length,) = struct.unpack("<I", memory.read(xsdt + 4, 4))
    for (gpa,) in struct.iter_unpack("<Q", memory.read(xsdt + 36, length - 36)):
        if memory.read(gpa, 4) == signature:
            return memory.read(gpa, struct.unpack("<I", memory.read(gpa + 4, 4))[0])
    return b""


# -- what may be persistent memory ----------------------------------------------------------------


def test_a_file_is_mapped_whole_and_what_is_stored_is_in_it(file: Path) -> None:
    region = persistent.open_region(PmemConfig(file=str(file)))
    with memoryview(region) as view:
        assert (len(view), view[SIZE - 1]) == (SIZE, 0x11)
        view[SIZE - 4 :] = b"news"
    region.close()
    assert file.read_bytes()[-4:] == b"news"
    assert file.stat().st_size == SIZE


def test_a_part_of_a_file_will_do(file: Path) -> None:
    region = persistent.open_region(PmemConfig(file=str(file), size=2 * MIB))
    assert region.size == 2 * MIB
    region.close()


def test_discarded_writes_leave_the_file_as_it_is(file: Path) -> None:
    file.chmod(0o400)
    region = persistent.open_region(PmemConfig(file=str(file), discard_writes=True))
    with memoryview(region) as view:
        view[0] = 0x22
        assert view[0] == 0x22
    region.close()
    assert file.read_bytes() == b"\x11" * SIZE


def test_in_a_directory_a_file_without_a_name_is_made(tmp_path: Path) -> None:
    region = persistent.open_region(PmemConfig(file=str(tmp_path), size=SIZE))
    assert os.listdir(tmp_path) == []
    with memoryview(region) as view:
        assert view[SIZE - 1] == 0
    region.close()


REFUSED: dict[str, dict[str, object]] = {
    "--pmem size 6M: .* has 4194304 bytes; a file is mapped as it is and never grown": {"size": 6 * MIB},
    "--pmem file /tmp: in a directory a file is made, so size= is required": {"file": "/tmp"},
    "--pmem file /dev/null: a regular file, a block device or a directory is needed": {"file": "/dev/null"},
    "cannot open /none/such: No such file or directory": {"file": "/none/such"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_none_is_refused_in_one_sentence(file: Path, sentence: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PileusError, match=f"^{sentence}$"):
        persistent.open_region(PmemConfig(**{"file": str(file), **REFUSED[sentence]}))  # type: ignore[arg-type]
    assert os.listdir("/proc/self/fd") == before


def test_a_fifo_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for discard in (False, True):
        with pytest.raises(ConfigError, match="a regular file, a block device or a directory"):
            persistent.open_region(PmemConfig(file=str(tmp_path / "fifo"), discard_writes=discard))


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, 3 * MIB])
def test_a_file_that_is_no_multiple_of_2_mib_is_refused(file: Path, size: int) -> None:
    os.truncate(file, size)
    with pytest.raises(ConfigError, match=rf"it has {size} bytes, no multiple of 2M$"):
        persistent.open_region(PmemConfig(file=str(file)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file immutable")
def test_a_file_that_cannot_be_written_to_needs_its_writes_discarded(file: Path) -> None:
    FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10  # noqa: N806 - as <linux/fs.h>
    with file.open("rb") as handle:
        try:
            (flags,) = struct.unpack("i", fcntl.ioctl(handle, FS_IOC_GETFLAGS, bytes(4)))
            fcntl.ioctl(handle, FS_IOC_SETFLAGS, struct.pack("i", flags | IMMUTABLE))
        except OSError:
            pytest.skip("this file system has no immutable files")
        try:
            with pytest.raises(
                ConfigError, match=r"it cannot be written to .*; discard_writes=on does without"
            ):
                persistent.open_region(PmemConfig(file=str(file)))
            persistent.open_region(PmemConfig(file=str(file), discard_writes=True)).close()
        finally:
            fcntl.ioctl(handle, FS_IOC_SETFLAGS, struct.pack("i", flags))


def test_one_writer_or_many_readers(file: Path) -> None:
    for writes, reads in [(False, True), (True, False), (False, False)]:
        region = persistent.open_region(PmemConfig(file=str(file), discard_writes=writes))
        with pytest.raises(HostError, match="in use by another process"):
            persistent.open_region(PmemConfig(file=str(file), discard_writes=reads))
        region.close()
    regions = [persistent.open_region(PmemConfig(file=str(file), discard_writes=True)) for _ in range(2)]
    for region in regions:
        region.close()


# -- in a machine ---------------------------------------------------------------------------------


def test_a_device_says_where_it_is_and_others_reach_it(kvm: Kvm, config: VmConfig, file: Path) -> None:
    vm = build(config, kvm, None, ignore, IDLE)
    (device,) = pmems(vm)
    gpa, size = struct.unpack("<QQ", device.config)
    assert (gpa, size, device.name) == (4 * GIB, SIZE, "_pmem0")
    vm.memory.write(gpa + 4096, b"by DMA")
    assert vm.memory.ranges == [(0, 16 * MIB)]
    assert table(vm.memory, b"NFIT") == b""
    vm.close()
    assert file.read_bytes()[4096:4102] == b"by DMA"


@pytest.mark.parametrize("pci", [True, False])
def test_several_go_side_by_side_on_either_transport(
    kvm: Kvm, config: VmConfig, tmp_path: Path, pci: bool
) -> None:
    config.pci = pci
    config.pmem += [
        PmemConfig(file=str(tmp_path), size=2 * MIB, id="mine"),
        PmemConfig(file=str(tmp_path), size=SIZE),
    ]
    vm = build(config, kvm, None, ignore, IDLE)
    places = [struct.unpack("<QQ", device.config) for device in pmems(vm)]
    assert places == [(4 * GIB + index * 128 * MIB, size) for index, size in enumerate([SIZE, 2 * MIB, SIZE])]
    assert [device.name for device in pmems(vm)] == ["_pmem0", "mine", "_pmem2"]
    vm.close()


def test_an_nvdimm_is_in_the_tables_and_is_no_device(kvm: Kvm, config: VmConfig, tmp_path: Path) -> None:
    config.pmem[0].nvdimm = True
    config.pmem.append(PmemConfig(file=str(tmp_path), size=2 * MIB, nvdimm=True, discard_writes=True))
    vm = build(config, kvm, None, ignore, IDLE)
    assert pmems(vm) == []
    nfit = table(vm.memory, b"NFIT")
    for gpa, size in [(4 * GIB, SIZE), (4 * GIB + 128 * MIB, 2 * MIB)]:
        assert struct.pack("<QQ", gpa, size) in nfit
    hints = [struct.pack("<Q", layout.NVDIMM_FLUSH + index * 4096) in nfit for index in range(2)]
    assert hints == [True, False], "nothing makes discarded writes durable"
    vm.close()


def test_a_flush_hint_is_durable_or_stops_the_vm(kvm: Kvm, config: VmConfig, file: Path) -> None:
    config.pmem[0].nvdimm = True
    vm = build(config, kvm, None, ignore, IDLE)
    mmio = next(bus for bus in vm._buses if bus.name == "mmio")
    mmio.store(layout.NVDIMM_FLUSH, 8, 1)
    assert mmio.load(layout.NVDIMM_FLUSH, 8) == 0
    os.truncate(file, 0)
    with pytest.raises(HostError, match=r"cannot make the memory of _pmem0 durable: .* was cut short"):
        mmio.store(layout.NVDIMM_FLUSH, 8, 1)
    vm.close()


def test_a_file_cut_short_fails_flushes_and_not_this_process(kvm: Kvm, config: VmConfig, file: Path) -> None:
    vm = build(config, kvm, None, ignore, IDLE)
    (device,) = pmems(vm)
    device._sync()
    os.truncate(file, 4096)
    with pytest.raises(OSError, match="was cut short"):
        device._sync()
    assert vm.memory.read(4 * GIB + 2 * MIB, 4) == bytes(4)
    os.truncate(file, SIZE)
    with pytest.raises(OSError, match="was cut short"):
        device._sync()  # what devices stored there is lost
    vm.close()


def test_discarded_writes_need_no_flush(kvm: Kvm, config: VmConfig, file: Path) -> None:
    config.pmem[0].discard_writes = True
    vm = build(config, kvm, None, ignore, IDLE)
    vm.memory.write(4 * GIB, b"\x22" * 4096)
    pmems(vm)[0]._sync()
    vm.close()
    assert file.read_bytes() == b"\x11" * SIZE


def test_what_the_guest_cannot_address_is_refused(kvm: Kvm, config: VmConfig, tmp_path: Path) -> None:
    before = tiny.held()
    config.cpus.max_phys_bits = 36
    config.pmem.append(PmemConfig(file=str(tmp_path), size=60 * GIB))
    with pytest.raises(ConfigError, match="--pmem size 60G: the guest has 36 bits of physical addresses"):
        build(config, kvm, None, ignore, IDLE)
    assert tiny.held() == before


def test_each_step_that_fails_gives_everything_back(kvm: Kvm, config: VmConfig, tmp_path: Path) -> None:
    config.pmem.append(PmemConfig(file=str(tmp_path), size=2 * MIB, nvdimm=True))
    build(config, kvm, None, ignore, IDLE).close()
    before = tiny.held()
    for nth in range(1, 100):
        failing = FailsAt(kvm, nth)
        try:
            build(config, failing, None, ignore, IDLE).close()  # type: ignore[arg-type]
        except PileusError:
            assert tiny.held() == before, f"after {failing.calls}"
        else:
            break
    assert failing.calls.count("set_memory") == 3
    config.pmem.append(PmemConfig(file="/none/such"))
    with pytest.raises(HostError):
        build(config, kvm, None, ignore, IDLE)
    assert tiny.held() == before


@pytest.mark.usefixtures("complete_kvm")
def test_a_guest_that_touches_what_was_cut_off_is_stopped_with_a_reason(kvm: Kvm, tmp_path: Path) -> None:
    """Here of a file of --memory, which a kernel of a few bytes can reach.

    A KVM that interprets such kernels takes missing memory for a device's.
    """
    events: list[Event] = []
    code = tiny.SAY_A + tiny.COUNT + tiny.SPIN_BACK
    vm = build(tiny.config(tmp_path, code, file=True), kvm, None, events.append, IDLE)
    vm.start()
    try:
        tiny.wait_until(lambda: vm.memory.read(tiny.COUNTER, 1) != b"\0")
        os.truncate(tmp_path / "ram", tiny.COUNTER)
        tiny.wait_until(lambda: bool(events))
    finally:
        vm.close()
    assert events[0].kind == FAILURE
    assert "is a file of --pmem or --memory cut short" in events[0].text

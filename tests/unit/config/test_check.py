"""Every rule across fields, with its sentence."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given

from pileus.config.check import check, check_vm
from pileus.config.declare import Struct
from pileus.config.model import (
    ApiSocketConfig,
    BalloonConfig,
    ConsoleConfig,
    CpusConfig,
    DeviceConfig,
    DiskConfig,
    EventMonitorConfig,
    FsConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    PmemConfig,
    RngConfig,
    SerialConfig,
    UserDeviceConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VmConfig,
    VmmConfig,
    VsockConfig,
)
from pileus.errors import ConfigError

from .strategies import of_struct

MIB, GIB = 1 << 20, 1 << 30
GOOD = [
    VmConfig(),
    VmConfig(cpus=CpusConfig(boot=2, max=8, topology=(2, 2, 1, 2))),
    VmConfig(cpus=CpusConfig(boot=2, max=4, affinity={3: [0]})),
    VmConfig(memory=MemoryConfig(size=2 * MIB)),
    VmConfig(memory=MemoryConfig(size=GIB, hugepages=True)),
    VmConfig(memory=MemoryConfig(size=2 * GIB, hugepages=True, hugepage_size=GIB)),
    VmConfig(memory=MemoryConfig(file="/dev/shm", shared=True)),
    VmConfig(payload=PayloadConfig(kernel="/k", cmdline="a", initramfs="/i")),
    VmConfig(serial=SerialConfig(mode="tty")),
    VmConfig(serial=SerialConfig(mode="file", file="/a"), console=ConsoleConfig(mode="socket", socket="/b")),
    VmConfig(net=[NetConfig(), NetConfig()]),
    VmConfig(net=[NetConfig(tap="a", num_queues=4), NetConfig(tap="b", mask="255.0.0.0")]),
    VmConfig(net=[NetConfig(fd=[3, 4]), NetConfig(fd=[5], num_queues=2)]),
    VmConfig(net=[NetConfig(ip="fd00::1", mask="ffff::")]),
    VmConfig(disks=[DiskConfig(vhost_user=True, socket="/s"), DiskConfig(path="/p")]),
    VmConfig(net=[NetConfig(vhost_user=True, socket="/s", vhost_mode="server", mac="2e:00:00:00:00:01")]),
    VmConfig(fs=[FsConfig(tag="a", sock="/s"), FsConfig(tag="b", socket="/t", dax=False)]),
    VmConfig(fs=[FsConfig(tag="a", sock="/s", cache_size=GIB)]),
    VmConfig(vhost_user_net=[VhostUserNetConfig(sock="/s")], vhost_user_blk=[VhostUserBlkConfig(sock="/t")]),
    VmConfig(vsock=VsockConfig(cid=3, socket="/" + 95 * "s")),
    VmConfig(pmem=[PmemConfig(file="/p"), PmemConfig(file="/tmp", size=2 * MIB, nvdimm=True, id="a")]),
    VmConfig(pmem=[PmemConfig(file="/p", discard_writes=True), PmemConfig(file="/p", discard_writes=True)]),
    VmConfig(
        devices=[DeviceConfig(path="/p"), DeviceConfig(path="/q")],
        user_devices=[UserDeviceConfig(socket="/s", id="a"), UserDeviceConfig(socket="/t")],
    ),
]
MAC = "2e:00:00:00:00:01"
BAD = {
    "--cpus boot=4,max=2: boot may be at most max": VmConfig(cpus=CpusConfig(boot=4, max=2)),
    "--cpus max=4,topology=1:2:1:1: the topology's product (2) must equal max (4)": VmConfig(
        cpus=CpusConfig(boot=2, max=4, topology=(1, 2, 1, 1))
    ),
    "--cpus max=2,affinity=[2@[0]]: there is no vCPU 2; they are 0 to 1": VmConfig(
        cpus=CpusConfig(boot=2, affinity={2: [0]})
    ),
    "--memory size=0: size is at least 2M": VmConfig(memory=MemoryConfig(size=0)),
    "--memory size=1M: size is at least 2M": VmConfig(memory=MemoryConfig(size=MIB)),
    "--memory size=512M: size is at least 1G": VmConfig(
        memory=MemoryConfig(hugepages=True, hugepage_size=GIB)
    ),
    "--memory size=4194305: size is a multiple of 4K": VmConfig(memory=MemoryConfig(size=4 * MIB + 1)),
    "--memory size=3M,hugepages=on: size is a multiple of 2M": VmConfig(
        memory=MemoryConfig(size=3 * MIB, hugepages=True)
    ),
    "--memory hugepage_size=2M: hugepage_size needs hugepages=on": VmConfig(
        memory=MemoryConfig(hugepage_size=2 * MIB)
    ),
    "--memory hugepage_size=4M: hugepage_size is 2M or 1G": VmConfig(
        memory=MemoryConfig(hugepages=True, hugepage_size=4 * MIB)
    ),
    "--memory hugepage_size=0: hugepage_size is 2M or 1G": VmConfig(
        memory=MemoryConfig(hugepages=True, hugepage_size=0)
    ),
    "--memory file=/a,hugepages=on: only one is possible;"
    " for huge pages in a file, name one on a hugetlbfs mount": VmConfig(
        memory=MemoryConfig(file="/a", hugepages=True)
    ),
    "--memory mergeable=on,shared=on: the host merges only small pages that are not shared": VmConfig(
        memory=MemoryConfig(mergeable=True, shared=True)
    ),
    "--memory mergeable=on,hugepages=on: the host merges only small pages that are not shared": VmConfig(
        memory=MemoryConfig(mergeable=True, hugepages=True)
    ),
    "--cmdline quiet: --kernel is needed as well": VmConfig(payload=PayloadConfig(cmdline="quiet")),
    "--initramfs /i: --kernel is needed as well": VmConfig(payload=PayloadConfig(initramfs="/i")),
    "--console tty: --serial is tty too, and there is one terminal;"
    " make one of them off, null, pty or a file": VmConfig(
        serial=SerialConfig(mode="tty"), console=ConsoleConfig(mode="tty")
    ),
    "--console /a: --serial has this path too; each needs its own": VmConfig(
        serial=SerialConfig(mode="file", file="/a"), console=ConsoleConfig(mode="socket", socket="/a")
    ),
    "--serial file: write file=PATH": VmConfig(serial=SerialConfig(mode="file")),
    "--balloon size=1G: the guest has 512M": VmConfig(balloon=BalloonConfig(size=1 << 30)),
    "--console socket: write socket=PATH": VmConfig(console=ConsoleConfig(mode="socket")),
    "--serial tty,file=/a: only one of tty and file= is possible": VmConfig(
        serial=SerialConfig(mode="tty", file="/a")
    ),
    "--serial file,socket=/b: only one of file and socket= is possible": VmConfig(
        serial=SerialConfig(mode="file", file="/a", socket="/b")
    ),
    "--net num_queues=3: receive and transmit queues make an even number": VmConfig(
        net=[NetConfig(num_queues=3)]
    ),
    "--net queue_size=100: a queue's size is a power of two": VmConfig(net=[NetConfig(queue_size=100)]),
    "--net tap=a,fd=[3]: one of tap and fd is enough": VmConfig(net=[NetConfig(tap="a", fd=[3])]),
    "--net fd=[3,4],num_queues=2: num_queues is twice the number of descriptors, 4": VmConfig(
        net=[NetConfig(fd=[3, 4], num_queues=2)]
    ),
    "--net fd=[2]: 0 to 2 are standard input, output and error": VmConfig(net=[NetConfig(fd=[2])]),
    "--disk path=: a path is required, or vhost_user=on with a socket": VmConfig(disks=[DiskConfig()]),
    "--disk vhost_user=on: socket= is required": VmConfig(disks=[DiskConfig(vhost_user=True)]),
    "--disk vhost_user=on,path=/p: the back-end decides, so path has no place": VmConfig(
        disks=[DiskConfig(vhost_user=True, socket="/s", path="/p")]
    ),
    "--disk vhost_user=on,iommu=on: no back-end can be behind the virtual IOMMU": VmConfig(
        disks=[DiskConfig(vhost_user=True, socket="/s", iommu=True)]
    ),
    "--disk iommu=on: the virtual IOMMU is a PCI device, and --pci is off": VmConfig(
        disks=[DiskConfig(path="/d", iommu=True)], pci=False
    ),
    "--rng iommu=on: the virtual IOMMU is a PCI device, and --pci is off": VmConfig(
        rng=RngConfig(iommu=True), pci=False
    ),
    "--net socket=/s: socket needs vhost_user=on": VmConfig(net=[NetConfig(socket="/s")]),
    "--net vhost_mode=server: vhost_mode needs vhost_user=on": VmConfig(net=[NetConfig(vhost_mode="server")]),
    "--net vhost_user=on,tap=a: the back-end decides, so tap has no place": VmConfig(
        net=[NetConfig(vhost_user=True, socket="/s", tap="a")]
    ),
    "--vhost-user-net num_queues=3: receive and transmit queues make an even number": VmConfig(
        vhost_user_net=[VhostUserNetConfig(sock="/s", num_queues=3)]
    ),
    "--vhost-user-blk queue_size=100: a queue's size is a power of two": VmConfig(
        vhost_user_blk=[VhostUserBlkConfig(sock="/s", queue_size=100)]
    ),
    "--vhost-user-blk sock=/s: another device has this socket already": VmConfig(
        vhost_user_blk=[VhostUserBlkConfig(sock="/s")], vhost_user_net=[VhostUserNetConfig(sock="/s")]
    ),
    "--fs tag=a: sock= is required": VmConfig(fs=[FsConfig(tag="a")]),
    "--fs sock=/s,socket=/t: one of sock and socket is enough": VmConfig(
        fs=[FsConfig(tag="a", sock="/s", socket="/t")]
    ),
    "--fs tag=a: another directory has this tag already": VmConfig(
        fs=[FsConfig(tag="a", sock="/s"), FsConfig(tag="a", sock="/t")]
    ),
    "--fs dax=off,cache_size=1G: without dax there is no window to size": VmConfig(
        fs=[FsConfig(tag="a", sock="/s", dax=False, cache_size=GIB)]
    ),
    "--fs cache_size=3M: a power of two, at least 4K": VmConfig(
        fs=[FsConfig(tag="a", sock="/s", cache_size=3 * MIB)]
    ),
    "--memory mergeable=on: a device of another process shares the memory,"
    " and the host merges only what is not shared": VmConfig(
        memory=MemoryConfig(mergeable=True), fs=[FsConfig(tag="a", sock="/s")]
    ),
    "--user-device socket=/s: it is a PCI device, and --pci is off": VmConfig(
        pci=False, user_devices=[UserDeviceConfig(socket="/s")]
    ),
    "--user-device socket=/s: another device has this socket already": VmConfig(
        user_devices=[UserDeviceConfig(socket="/s"), UserDeviceConfig(socket="/s")]
    ),
    "--user-device id=a: another device has this id already": VmConfig(
        devices=[DeviceConfig(path="/p", id="a")], user_devices=[UserDeviceConfig(socket="/s", id="a")]
    ),
    "--device path=/p/: it is given twice": VmConfig(
        devices=[DeviceConfig(path="/p"), DeviceConfig(path="/p/")]
    ),
    "--balloon size=0: the host cannot have memory back while --device lets a device of the host"
    " reach all of it": VmConfig(devices=[DeviceConfig(path="/p")], balloon=BalloonConfig()),
    "--net ip=fd00::1,mask=255.0.0.0: ip and mask are both of IPv4 or both of IPv6": VmConfig(
        net=[NetConfig(ip="fd00::1", mask="255.0.0.0")]
    ),
    "--net tap=a: another interface has this tap already": VmConfig(
        net=[NetConfig(tap="a"), NetConfig(), NetConfig(tap="a")]
    ),
    "--net id=a: another interface has this id already": VmConfig(net=[NetConfig(id="a"), NetConfig(id="a")]),
    f"--net mac={MAC}: another interface has this mac already": VmConfig(
        net=[NetConfig(mac=MAC), NetConfig(mac=MAC)]
    ),
    "--net fd=[3,4]: another interface has one of them too": VmConfig(
        net=[NetConfig(fd=[3, 4]), NetConfig(fd=[4, 5])]
    ),
    f"--vsock socket={93 * 's'}... (104 characters):"
    " socket is a path of at most 96 bytes, so that _PORT fits behind it": VmConfig(
        vsock=VsockConfig(cid=3, socket=97 * "s")
    ),
    "--vsock socket=/a: --serial has this path too; each needs its own": VmConfig(
        serial=SerialConfig(mode="socket", socket="/a"), vsock=VsockConfig(cid=3, socket="/a")
    ),
    "--vsock id=a: another device has this id already": VmConfig(
        net=[NetConfig(id="a")], vsock=VsockConfig(cid=3, socket="/s", id="a")
    ),
    "--pmem size=0: size is a multiple of 2M": VmConfig(pmem=[PmemConfig(file="/p", size=0)]),
    "--pmem size=3M: size is a multiple of 2M": VmConfig(pmem=[PmemConfig(file="/p", size=3 * MIB)]),
    "--pmem nvdimm=on,iommu=on: an NVDIMM is no device behind an IOMMU": VmConfig(
        pmem=[PmemConfig(file="/p", nvdimm=True, iommu=True)]
    ),
    "--pmem id=a: another device has this id already": VmConfig(
        pmem=[PmemConfig(file="/p", id="a"), PmemConfig(file="/q", id="a")]
    ),
    "--pmem (33 of them): at most 32 are possible": VmConfig(
        pmem=[PmemConfig(file=f"/p{number}") for number in range(33)]
    ),
}


@pytest.mark.parametrize("vm", GOOD)
def test_a_sound_configuration_passes(vm: VmConfig) -> None:
    check(VmmConfig(vm=vm))


@pytest.mark.parametrize("sentence", BAD)
def test_a_broken_rule_is_told_in_one_sentence(sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_vm(BAD[sentence])
    assert str(caught.value) == sentence


def test_the_api_has_one_socket() -> None:
    with pytest.raises(ConfigError, match=r"^--api-socket path=/a,fd=3: one of path and fd is enough$"):
        check(VmmConfig(api_socket=ApiSocketConfig(path="/a", fd=3)))
    check(VmmConfig(api_socket=ApiSocketConfig(fd=0)))


@pytest.mark.parametrize("given", [{}, {"path": "/a", "fd": 3}])
def test_events_go_to_one_place(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--event-monitor .*one of path and fd is needed"):
        check(VmmConfig(event_monitor=EventMonitorConfig(**given)))
    check(VmmConfig(event_monitor=EventMonitorConfig(path="/a")))


@given(of_struct(CpusConfig), of_struct(MemoryConfig), of_struct(SerialConfig), of_struct(ConsoleConfig))
def test_any_configuration_passes_or_is_refused(
    cpus: Struct, memory: Struct, serial: Struct, console: Struct
) -> None:
    with suppress(ConfigError):
        check_vm(VmConfig(cpus=cpus, memory=memory, serial=serial, console=console))  # type: ignore[arg-type]


def test_the_payload_is_checked_by_any_length_of_cmdline() -> None:
    with pytest.raises(ConfigError, match=r"\(60000 characters\): --kernel is needed"):
        check_vm(VmConfig(payload=PayloadConfig(cmdline="a" * 60000)))

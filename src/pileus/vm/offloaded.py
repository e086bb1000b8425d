"""The back-end processes of ``offload=on``, made of the configuration.

They begin before the rest of the machine is made, and get ready beside it; each device meets its own later.
"""

import os

from pileus.block.open import open_file
from pileus.config.backends import DiskBackendConfig, NetBackendConfig
from pileus.config.grammar import format_struct
from pileus.vhost_user.offload import FIRST, Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.cleanup import Cleanup
    from pileus.config.model import DiskConfig, NetConfig, VmConfig
    from pileus.vm.vm import Loop


class Interface:
    """The child that serves a TAP; the guest's MAC address, and the MTU that it is to know."""

    def __init__(self, child: Child, mac: bytes, mtu: int | None) -> None:
        self.child = child
        self.mac = mac
        self.mtu = mtu


class Offloaded:
    """The children of a VM by the index of their option. Raises HostError; ``cleanup`` ends them."""

    def __init__(self, config: "VmConfig", loop: "Loop", cleanup: "Cleanup") -> None:
        self.disks: dict[int, Child] = {}
        self.interfaces: dict[int, Interface] = {}
        for index, disk in enumerate(config.disks):
            if disk.offload:
                self.disks[index] = cleanup.own(disk_child(disk, index, loop))
                self.disks[index].begin()
        for index, net in enumerate(config.net):
            if net.offload:
                self.interfaces[index] = interface_child(net, index, loop)
                cleanup.own(self.interfaces[index].child).begin()


def disk_child(config: "DiskConfig", index: int, loop: "Loop") -> Child:
    """For the image, which is opened here. Raises HostError."""
    name = config.id or f"_disk{index}"
    assert config.path is not None  # by the rules of the configuration
    told = DiskBackendConfig(
        path=config.path,
        fd=FIRST,
        readonly=config.readonly,
        direct=config.direct,
        num_queues=config.num_queues,
        queue_size=config.queue_size,
        serial=config.serial,
        image_type=config.image_type,
        id=name,
    )
    fd = open_file(config.path, config.readonly, config.direct)
    words = ["--backend", format_struct(told)]
    return Child(name, "pileus-blk", words, [fd], loop, lambda: os.close(fd))


def interface_child(config: "NetConfig", index: int, loop: "Loop") -> Interface:
    """For the TAP, which is opened and set up here. Raises HostError."""
    from pileus.virtio.devices.net import open_host_side

    name = config.id or f"_net{index}"
    tap, mac, mtu = open_host_side(config)
    told = NetBackendConfig(
        fd=list(range(FIRST, FIRST + len(tap.fds))),
        num_queues=config.num_queues,
        queue_size=config.queue_size,
        id=name,
    )
    words = ["--backend", format_struct(told)]
    return Interface(Child(name, "pileus-net", words, tap.fds, loop, tap.close), mac, mtu)

"""The devices whose queues a vhost-user back-end serves, made of the configuration."""

import os

from pileus.config.grammar import format_struct
from pileus.net import mac as mac_address
from pileus.vhost_user.connection import Client, Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pileus.config.model import DiskConfig, NetConfig, VmConfig
    from pileus.vhost_user.devices.device import Peer, VhostUserDevice
    from pileus.vm.vm import Loop

SERVER_PATIENCE = 30.0  # seconds for a back-end that has to be started once we listen


def make(config: "VmConfig", loop: "Loop") -> "Iterator[VhostUserDevice]":
    """Those of options of their own. Raises ConfigError and HostError for an unfit back-end."""
    for index, fs in enumerate(config.fs):
        from pileus.vhost_user.devices.fs import VhostUserFs

        yield VhostUserFs(
            f"_fs{index}",
            "--fs",
            Client(fs.path),
            loop,
            tag=fs.tag,
            num_queues=fs.num_queues,
            queue_size=fs.queue_size,
        )
    for index, net in enumerate(config.vhost_user_net):
        from pileus.vhost_user.devices.net import VhostUserNet

        yield VhostUserNet(
            f"_vhost_user_net{index}",
            "--vhost-user-net",
            Client(net.sock),
            loop,
            mac=_mac(net.mac),
            num_queues=net.num_queues,
            queue_size=net.queue_size,
        )
    for index, blk in enumerate(config.vhost_user_blk):
        from pileus.vhost_user.devices.blk import VhostUserBlk

        yield VhostUserBlk(
            f"_vhost_user_blk{index}",
            "--vhost-user-blk",
            Client(blk.sock),
            loop,
            num_queues=blk.num_queues,
            queue_size=blk.queue_size,
            wce=blk.wce,
        )


def open_disk(config: "DiskConfig", index: int, loop: "Loop") -> "VhostUserDevice":
    """The disk of ``--disk vhost_user=on``, or ``offload=on``."""
    from pileus.vhost_user.devices.blk import VhostUserBlk

    return VhostUserBlk(
        config.id or f"_disk{index}",
        "--disk",
        _disk_child(config) if config.offload else Client(config.socket or ""),
        loop,
        num_queues=config.num_queues,
        queue_size=config.queue_size,
    )


def open_net(config: "NetConfig", index: int, loop: "Loop") -> "VhostUserDevice":
    """The interface of ``--net vhost_user=on``, or ``offload=on``."""
    from pileus.vhost_user.devices.device import PATIENCE
    from pileus.vhost_user.devices.net import CHECKSUMS, SEGMENTS, UDP, VhostUserNet

    withheld = 0 if config.offload_csum else CHECKSUMS | SEGMENTS | UDP
    withheld |= (0 if config.offload_tso else SEGMENTS) | (0 if config.offload_ufo else UDP)
    path = config.socket or ""
    mac = None
    peer: Peer
    if config.offload:
        peer, mac = _net_child(config)
    else:
        peer = Server(path) if config.vhost_mode == "server" else Client(path)
    return VhostUserNet(
        config.id or f"_net{index}",
        "--net",
        peer,
        loop,
        mac=mac or _mac(config.mac),
        num_queues=config.num_queues,
        queue_size=config.queue_size,
        withheld=withheld,
        patience=SERVER_PATIENCE if config.vhost_mode == "server" else PATIENCE,
    )


def _disk_child(config: "DiskConfig") -> "Peer":
    """A process for the image, which is opened here. Raises HostError."""
    from pileus.block.open import open_file
    from pileus.config.backends import DiskBackendConfig
    from pileus.vhost_user.offload import FIRST, Child

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
    )
    fd = open_file(config.path, config.readonly, config.direct)
    return Child("pileus-blk", ["--backend", format_struct(told)], [fd], lambda: os.close(fd))


def _net_child(config: "NetConfig") -> "tuple[Peer, bytes]":
    """A process for the TAP, which is opened here, and the guest's MAC address. Raises HostError."""
    from pileus.config.backends import NetBackendConfig
    from pileus.vhost_user.offload import FIRST, Child
    from pileus.virtio.devices.net import open_host_side

    tap, mac, _ = open_host_side(config)
    told = NetBackendConfig(
        fd=list(range(FIRST, FIRST + len(tap.fds))),
        num_queues=config.num_queues,
        queue_size=config.queue_size,
    )
    return Child("pileus-net", ["--backend", format_struct(told)], tap.fds, tap.close), mac


def _mac(text: str | None) -> bytes:
    return mac_address.encode(text) if text else mac_address.make()

"""The devices whose queues a vhost-user back-end serves, made of the configuration."""

from pileus.net import mac as mac_address
from pileus.vhost_user.connection import Client, Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pileus.config.model import DiskConfig, NetConfig, VmConfig
    from pileus.vhost_user.devices.device import Peer, VhostUserDevice
    from pileus.vhost_user.offload import Child
    from pileus.vm.offloaded import Interface
    from pileus.vm.vm import Loop

SERVER_PATIENCE = 30.0  # seconds for a back-end that has to be started once we listen
CHILD_PATIENCE = 30.0  # seconds for one of ours to answer first: the machine may be busy starting many


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
            cache_size=(fs.cache_size or 0) if fs.dax else 0,
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


def open_disk(
    config: "DiskConfig", index: int, loop: "Loop", child: "Child | None" = None
) -> "VhostUserDevice":
    """The disk of ``--disk vhost_user=on``, or of ``offload=on``, which ``child`` serves."""
    from pileus.vhost_user.devices.blk import VhostUserBlk
    from pileus.vhost_user.devices.device import PATIENCE

    return VhostUserBlk(
        config.id or f"_disk{index}",
        "--disk",
        child or Client(config.socket or ""),
        loop,
        num_queues=config.num_queues,
        queue_size=config.queue_size,
        patience=CHILD_PATIENCE if child is not None else PATIENCE,
    )


def open_net(
    config: "NetConfig", index: int, loop: "Loop", offloaded: "Interface | None" = None
) -> "VhostUserDevice":
    """The interface of ``--net vhost_user=on``, or of ``offload=on``, which is ``offloaded``."""
    from pileus.vhost_user.devices.device import PATIENCE
    from pileus.vhost_user.devices.net import CHECKSUMS, SEGMENTS, UDP, VhostUserNet

    withheld = 0 if config.offload_csum else CHECKSUMS | SEGMENTS | UDP
    withheld |= (0 if config.offload_tso else SEGMENTS) | (0 if config.offload_ufo else UDP)
    path = config.socket or ""
    mac = mtu = None
    peer: Peer
    if offloaded is not None:
        peer, mac, mtu, patience = offloaded.child, offloaded.mac, offloaded.mtu, CHILD_PATIENCE
    elif config.vhost_mode == "server":
        peer, patience = Server(path), SERVER_PATIENCE
    else:
        peer, patience = Client(path), PATIENCE
    return VhostUserNet(
        config.id or f"_net{index}",
        "--net",
        peer,
        loop,
        mac=mac or _mac(config.mac),
        mtu=mtu,
        num_queues=config.num_queues,
        queue_size=config.queue_size,
        withheld=withheld,
        patience=patience,
    )


def _mac(text: str | None) -> bytes:
    return mac_address.encode(text) if text else mac_address.make()

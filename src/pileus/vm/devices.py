"""The virtio devices of a configuration, in the order of their slots: the one list of factories."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pileus.cleanup import Cleanup
    from pileus.config.model import VmConfig
    from pileus.virtio.device import VirtioDevice


def make(config: "VmConfig", cleanup: "Cleanup") -> "Iterator[VirtioDevice]":
    """Each device, given to ``cleanup`` as it is made. Raises PileusError where the host refuses one."""
    for index, net in enumerate(config.net):
        from pileus.virtio.devices.net import open_net

        yield cleanup.own(open_net(net, index))
    from pileus.virtio.devices.rng import FileSource, Rng

    yield cleanup.own(Rng("rng0", cleanup.own(FileSource(config.rng.src))))
    if config.vsock is not None:
        from pileus.virtio.devices.vsock import open_vsock

        yield cleanup.own(open_vsock(config.vsock))

"""The virtio devices of a configuration, in the order of their slots: the one list of factories."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pileus.cleanup import Cleanup
    from pileus.config.model import VmConfig
    from pileus.console import Console
    from pileus.virtio.device import VirtioDevice
    from pileus.vm.offloaded import Offloaded
    from pileus.vm.persistent import PersistentMemory
    from pileus.vm.vm import Loop


def make(
    config: "VmConfig",
    cleanup: "Cleanup",
    console: "Console | None",
    loop: "Loop",
    persistent: "Sequence[PersistentMemory]" = (),
    offloaded: "Offloaded | None" = None,
) -> "Iterator[VirtioDevice]":
    """Each device, given to ``cleanup`` as it is made. Raises PileusError where the host refuses one.

    ``console`` is the far end of the virtio console, None for no such device. ``loop`` watches back-ends.
    ``persistent`` is memory in its place already, ``offloaded`` the processes that have begun.
    """
    if console is not None:
        from pileus.virtio.devices.console import make_console

        port = cleanup.own(make_console(console))
        console.connect(port)
        cleanup.call(console.disconnect)
        yield _behind(config.console.iommu, port)
    for index, disk in enumerate(config.disks):
        if disk.vhost_user or disk.offload:
            from pileus.vm import vhost_user_devices

            child = offloaded.disks.get(index) if offloaded is not None else None
            yield cleanup.own(vhost_user_devices.open_disk(disk, index, loop, child))
            continue
        from pileus.virtio.devices.blk import open_disk

        yield _behind(disk.iommu, cleanup.own(open_disk(disk, index)))
    for index, net in enumerate(config.net):
        if net.vhost_user or net.offload:
            from pileus.vm import vhost_user_devices

            interface = offloaded.interfaces.get(index) if offloaded is not None else None
            yield cleanup.own(vhost_user_devices.open_net(net, index, loop, interface))
            continue
        from pileus.virtio.devices.net import open_net

        yield _behind(net.iommu, cleanup.own(open_net(net, index)))
    from pileus.virtio.devices.rng import FileSource, Rng

    yield _behind(config.rng.iommu, cleanup.own(Rng("rng0", cleanup.own(FileSource(config.rng.src)))))
    if config.balloon is not None:
        from pileus.virtio.devices.balloon import make_balloon

        yield cleanup.own(make_balloon(config.balloon))
    for memory, pmem in zip(persistent, config.pmem, strict=False):
        if not memory.nvdimm:
            from pileus.virtio.devices.pmem import Pmem

            device = cleanup.own(Pmem(memory.name, memory.gpa, memory.size, memory.sync))
            yield _behind(pmem.iommu, device)
    if config.fs or config.vhost_user_net or config.vhost_user_blk:
        from pileus.vm import vhost_user_devices

        yield from map(cleanup.own, vhost_user_devices.make(config, loop))
    if config.vsock is not None:
        from pileus.virtio.devices.vsock import open_vsock

        yield _behind(config.vsock.iommu, cleanup.own(open_vsock(config.vsock)))
    if config.has_iommu:
        from pileus.virtio.devices.iommu import IommuDevice

        yield cleanup.own(IommuDevice("iommu0"))


def _behind(iommu: bool, device: "VirtioDevice") -> "VirtioDevice":
    device.behind_iommu = iommu
    return device

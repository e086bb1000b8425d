"""The devices that pass through, made of the configuration: the host's (VFIO), and other processes'."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.model import VmConfig
    from pileus.memory import GuestMemory
    from pileus.vm.mmio_devices import MmioDevices
    from pileus.vm.pci_devices import PciDevices
    from pileus.vm.vm import Loop


def add(
    config: "VmConfig",
    carrier: "MmioDevices | PciDevices",
    memory: "GuestMemory",
    loop: "Loop",
) -> None:
    """Put each into a slot of ``carrier``, a PCI bus. Raises PileusError where one cannot be had.

    A device behind the virtual IOMMU has a container to itself, which follows its domain.
    """
    from pileus.vm.pci_devices import PciDevices

    assert isinstance(carrier, PciDevices), "config.check refuses such devices without PCI"
    if config.devices:
        _add_host_devices(config, carrier, memory, loop)
    for index, user in enumerate(config.user_devices):
        from pileus.vfio_user.client import Client, connect

        sock = connect("--user-device", user.socket)
        carrier.pass_through(Client(sock, user.id or f"_vfio_user{index}", memory), loop)


def _add_host_devices(config: "VmConfig", carrier: "PciDevices", memory: "GuestMemory", loop: "Loop") -> None:
    from pileus.kvm.assigned import Assigned
    from pileus.vfio.container import Container
    from pileus.vfio.device import HostDevice

    assigned = carrier.own(Assigned(carrier.vm))
    shared: Container | None = None  # of all that see the memory where the guest does
    for index, device in enumerate(config.devices):
        container = shared
        if container is None or device.iommu:
            container = carrier.own(Container(memory, assigned))
        host = HostDevice(container, device.path, device.id or f"_vfio{index}")
        if device.iommu:
            carrier.pass_through(host, loop, container)
            continue
        if shared is None:
            shared = container
            try:
                shared.open_all()
            except BaseException:
                host.close()
                raise
        carrier.pass_through(host, loop)

"""The devices that pass through, made of the configuration: the host's (VFIO), and other processes'."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.model import VmConfig
    from pileus.kvm.slots import Slots
    from pileus.memory import GuestMemory
    from pileus.vm.mmio_devices import MmioDevices
    from pileus.vm.pci_devices import PciDevices
    from pileus.vm.vm import Loop


def add(
    config: "VmConfig",
    carrier: "MmioDevices | PciDevices",
    memory: "GuestMemory",
    slots: "Slots",
    loop: "Loop",
) -> None:
    """Put each into a slot of ``carrier``, a PCI bus. Raises PileusError where one cannot be had."""
    from pileus.vm.pci_devices import PciDevices

    assert isinstance(carrier, PciDevices), "config.check refuses such devices without PCI"
    if config.devices:
        from pileus.vfio.container import Container
        from pileus.vfio.device import HostDevice

        container = carrier.own(Container(memory))
        for index, device in enumerate(config.devices):
            name = device.id or f"_vfio{index}"
            carrier.pass_through(HostDevice(container, device.path, name), slots, loop)
    for index, user in enumerate(config.user_devices):
        from pileus.vfio_user.client import Client, connect

        sock = connect("--user-device", user.socket)
        carrier.pass_through(Client(sock, user.id or f"_vfio_user{index}", memory), slots, loop)

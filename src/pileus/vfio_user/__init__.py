"""vfio-user: PCI devices that another process emulates. Both ends, and a framework for devices."""

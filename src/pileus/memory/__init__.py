"""Guest memory: regions of host memory, placed in the guest-physical address space, checked on every access."""

from pileus.memory._space import GuestMemory, Region

__all__ = ["GuestMemory", "Region"]

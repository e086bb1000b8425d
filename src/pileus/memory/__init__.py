"""Guest memory: regions of host memory at guest-physical addresses, checked on every access."""

from pileus.memory._space import GuestMemory, Region, Translation

__all__ = ["GuestMemory", "Region", "Translation"]

"""Addresses to devices, for ports and MMIO alike.

A device sees an offset within its range and a size of 1, 2, 4 or 8 bytes, never its address. One
written in Python derives from :class:`PythonDevice` and overrides ``read`` and ``write``; one on a hot
path is compiled and overrides ``bus_read`` and ``bus_write`` (see ``_bus.pxd``), which run without the GIL.
"""

from pileus.bus._bus import Bus, Device, PythonDevice

__all__ = ["Bus", "Device", "PythonDevice"]

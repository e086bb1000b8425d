"""The serial port: see ``_serial.pyx``."""

from pileus.devices._serial import Serial

__all__ = ["Serial"]

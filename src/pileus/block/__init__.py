"""Disk images: raw files, block devices and QCOW2, behind one face."""

"""PCI functions whose device is elsewhere: one of the host's (VFIO), or another process's (vfio-user)."""

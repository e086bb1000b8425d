"""A PCI host: one bus of functions, found by configuration space, interrupting by message."""

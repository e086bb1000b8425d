"""Numbers of the devices. Source: virtio 1.2, 5 (Device Types)"""

NET = 1
BLOCK = 2
CONSOLE = 3
RNG = 4
BALLOON = 5
VSOCK = 19
IOMMU = 23
MEM = 24
FS = 26
PMEM = 27

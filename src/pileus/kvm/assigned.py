"""Tells KVM which of the host's devices a VM has.

It then heeds DMA that does not snoop caches, and may post a device's interrupts to a running vCPU.
Sources: KVM API §4.79, §4.80; Documentation/virt/kvm/devices/vfio.rst
"""

import array
import fcntl
import os
from errno import EINVAL, ENODEV, ENOTTY
from struct import Struct

from pileus import log
from pileus.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.kvm import Vm

CREATE_DEVICE, SET_DEVICE_ATTR = 0xC00CAEE0, 0x4018AEE1
DEVICE = Struct("=III")  # type, descriptor, flags
VFIO = 4  # a type
ATTRIBUTE = Struct("=IIQQ")  # flags, group, attribute, address
FILE, ADD, REMOVE = 1, 1, 2  # a group; attributes in it


class Assigned:
    """KVM's VFIO pseudo-device of ``vm``; without one where this KVM has none. One a VM. Raises KvmError."""

    def __init__(self, vm: "Vm") -> None:
        request = bytearray(DEVICE.pack(VFIO, 0, 0))
        try:
            fcntl.ioctl(vm.fd, CREATE_DEVICE, request)
        except OSError as error:
            if error.errno not in (EINVAL, ENODEV, ENOTTY):
                raise KvmError("KVM_CREATE_DEVICE", error.errno or 0, "VFIO") from error
            log.debug("this KVM takes no note of the host's devices")
            self._fd = -1
            return
        self._fd = DEVICE.unpack(request)[1]

    def add(self, fd: int) -> None:
        """Tell of ``fd``, a group of VFIO, which KVM holds open until ``remove``. Raises KvmError."""
        self._set(ADD, fd)

    def remove(self, fd: int) -> None:
        self._set(REMOVE, fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self, attribute: int, fd: int) -> None:
        if self._fd < 0:
            return
        place = array.array("i", [fd])
        try:
            fcntl.ioctl(self._fd, SET_DEVICE_ATTR, ATTRIBUTE.pack(0, FILE, attribute, place.buffer_info()[0]))
        except OSError as error:
            raise KvmError("KVM_SET_DEVICE_ATTR", error.errno or 0, "VFIO") from error

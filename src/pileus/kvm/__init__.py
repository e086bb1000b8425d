"""The KVM binding: ``Kvm`` makes a ``Vm``, a ``Vm`` makes ``Vcpu`` s. Source: Documentation/virt/kvm/api.rst.

Every failed ioctl raises :class:`pileus.errors.KvmError` with its name. Numbers and structures come from the
kernel's headers at build time.
"""

from pileus.kvm._kvm import Kvm
from pileus.kvm._vcpu import Vcpu
from pileus.kvm._vm import Vm

__all__ = ["Kvm", "Vcpu", "Vm"]

"""KVM's VFIO pseudo-device, on the host's KVM. Real groups are told to it in tests/guest/test_vfio.py."""

import os

import pytest

from pileus.errors import KvmError
from pileus.kvm.assigned import Assigned
from tests.unit.kvm.conftest import Machine


def test_there_is_one_for_a_vm(machine: Machine) -> None:
    first = Assigned(machine.vm)
    if first._fd < 0:
        pytest.skip("this KVM has none")
    with pytest.raises(KvmError, match="KVM_CREATE_DEVICE"):
        Assigned(machine.vm)
    first.close()


def test_a_file_that_is_no_group_is_refused(machine: Machine) -> None:
    assigned = Assigned(machine.vm)
    if assigned._fd < 0:
        pytest.skip("this KVM has none")
    with open(os.devnull) as file, pytest.raises(KvmError, match="KVM_SET_DEVICE_ATTR"):
        assigned.add(file.fileno())
    assigned.close()
    assigned.add(0)  # nobody to be told

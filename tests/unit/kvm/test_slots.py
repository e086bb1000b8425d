"""Slots are given out and taken back, and a failure costs none."""

import pytest

from pileus.errors import KvmError
from pileus.kvm.slots import Slots


class Memory:
    size = 0x1000
    hva = 0x7000_0000_0000


class FakeVm:
    def __init__(self) -> None:
        self.filled: dict[int, int] = {}
        self.failing = False

    def set_memory(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        if self.failing:
            raise KvmError("KVM_SET_USER_MEMORY_REGION", 17)
        if size:
            assert slot not in self.filled
            self.filled[slot] = gpa
        else:
            del self.filled[slot]


def test_slots_are_given_out_and_again() -> None:
    vm = FakeVm()
    slots = Slots(vm, 2)
    assert [slots.insert(gpa << 12, Memory()) for gpa in range(3)] == [2, 3, 4]
    slots.remove(3)
    assert vm.filled == {2: 0, 4: 0x2000}
    vm.failing = True
    for _ in range(2):
        with pytest.raises(KvmError):
            slots.insert(0, Memory())
    vm.failing = False
    assert [slots.insert(gpa << 12, Memory()) for gpa in range(2)] == [3, 5]

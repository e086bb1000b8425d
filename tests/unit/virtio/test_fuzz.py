"""A taste of ``fuzz/devices.py``: some drivers of each kind, the same each time."""

import pytest

from fuzz import devices
from pileus.testing import make_memory
from tests.unit.virtio.factories import FACTORIES

CASES = 25


@pytest.mark.parametrize("name", FACTORIES)
def test_a_device_lives_through_hostile_drivers(name: str) -> None:
    with make_memory(devices.RANGES, guarded=True) as memory:
        for number in range(CASES):
            devices.run(name, FACTORIES[name], number, 3, memory)

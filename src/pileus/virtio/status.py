"""The device status: what a driver may write, and when.

Source: virtio 1.2, 2.1 (Device Status Field) and 3.1.1 (Driver Requirements: Device Initialization)
"""

ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 64
FAILED = 128

NEEDS = {  # a bit of the status, and the bits that must be there before it counts
    ACKNOWLEDGE: 0,
    DRIVER: ACKNOWLEDGE,
    FEATURES_OK: ACKNOWLEDGE | DRIVER,
    DRIVER_OK: ACKNOWLEDGE | DRIVER | FEATURES_OK,
    FAILED: 0,
}


def step(now: int, written: int) -> int:
    """The status after a driver's write that is no reset: bits are only ever added, each in its turn."""
    status = now
    for bit, before in NEEDS.items():
        if written & bit and status & before == before:
            status |= bit
    return status

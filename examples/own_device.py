"""A virtio device in plain Python, an entropy source that is no good; its driver here is one in memory.

In a VM of this process it would be ``VirtualMachine(…, in_process=True, devices=[lambda: Dice("dice0")])``.
"""

from pileus.testing import FakeDriver
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice


class Dice(VirtioDevice):
    """Fills each buffer of its guest with throws of a die."""

    id = ids.RNG
    queue_sizes = (64,)

    def handle_queue(self, index: int) -> None:
        queue = self.queues[index]
        for chain in queue:
            queue.push_used(chain, chain.write(bytes([4]) * chain.writable_len))  # a fair one said 4


with FakeDriver(Dice("dice0")) as driver:
    head = driver.add(writable=[6])
    driver.kick(0)
    print("the guest has", list(driver.read(head)))

"""The device's process of the network benchmark: pileus's virtio-net, its queues set up as a guest would.

``net_backend.py MEMORY_FD INTERFACE PROGRAM MODE LENGTH GSO SECONDS IOMMU`` runs PROGRAM, the driver's
script, and prints packets, seconds, and the CPU seconds that this process took meanwhile.
"""

import os
import subprocess
import sys
import time

from pileus.config.model import NetConfig
from pileus.memory import GuestMemory, Region
from pileus.testing.memory import page_by_page
from pileus.virtio import status
from pileus.virtio.control import Control
from pileus.virtio.devices.net import open_net

SIZE, RINGS = 256, 0x10000
DEVICE_CPU, DRIVER_CPU = 0, 1


def main(
    memory_fd: int, interface: str, program: str, mode: str, length: str, gso: str, seconds: str, iommu: str
) -> None:
    os.sched_setaffinity(0, {DEVICE_CPU})
    device = open_net(NetConfig(tap=interface, mac="2e:00:00:00:00:01"), 0)
    memory = GuestMemory([(0, Region(memory_fd, os.fstat(memory_fd).st_size))])
    if int(iommu):
        device.iommu = page_by_page(memory.ranges[0][1])
    control = Control(device, memory)
    for bits in (1, 3):
        control.set_status(bits)
    for word in (0, 1):
        control.device_features_select = control.driver_features_select = word
        control.driver_features = control.device_features
    control.set_status(11)
    assert control.status & status.FEATURES_OK
    for index in (0, 1):
        control.queue_select = index
        control.set_queue_size(SIZE)
        base = RINGS * (1 + index)
        for which, offset in (("descriptors", 0), ("available", 0x2000), ("used", 0x4000)):
            control.set_queue_address(which, False, base + offset)
        device.queues[index].call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        control.enable_queue()
    control.set_status(15)
    kicks = [device.queues[index].kick_fd for index in (0, 1)]
    for fd in (memory_fd, *kicks):
        os.set_inheritable(fd, True)
    words = [mode, memory_fd, *kicks, "-", interface, length, gso, seconds]
    command = ["taskset", "-c", str(DRIVER_CPU), sys.executable, program, *map(str, words)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, close_fds=False)
    assert driver.stdout
    assert driver.stdout.readline() == b"go\n"
    before = time.process_time()
    result = driver.stdout.readline().decode().strip()
    print(result, time.process_time() - before)
    driver.wait()
    control.reset()
    device.close()


main(int(sys.argv[1]), *sys.argv[2:])

"""Runs a kernel for a moment and writes a core of it, for ``gdb -core`` or ``drgn -c``.

python coredump.py KERNEL CORE
"""

import sys
import time

from pileus import VirtualMachine

kernel, core = sys.argv[1:]
with VirtualMachine(kernel=kernel, memory="64M") as vm:
    time.sleep(0.2)
    vm.coredump(core)
    print(f"{core} has the memory of a VM that is {vm.state}")

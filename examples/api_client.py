"""Leads a VM through its life by the API of a pileus that runs: ``pileus --api-socket PATH`` is one.

python api_client.py PATH KERNEL [COMMAND-LINE]
"""

import sys

from pileus import ApiError, Client

path, kernel, *cmdline = sys.argv[1:]
vmm = Client(path, timeout=30)
print("there is", vmm.ping().build_version)
vmm.create(
    {
        "payload": {"kernel": kernel, "cmdline": " ".join(cmdline)},
        "cpus": {"boot_vcpus": 2},
        "memory": {"size": 64 << 20},
        "console": {"mode": "Off"},
    }
)
for step in (vmm.boot, vmm.pause, vmm.resume):
    step()
    print(step.__name__, "->", vmm.info().state)
try:
    vmm.boot()
except ApiError as error:
    print(f"refused with {error.status}: {error}")
vmm.delete()

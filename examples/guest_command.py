"""Boots a Debian system, runs a command in it over vsock, and prints what that says.

python guest_command.py KERNEL INITRAMFS DISK COMMAND
"""

import sys

from pileus import VirtualMachine

kernel, initramfs, disk, command = sys.argv[1:]
agent = "modprobe vmw_vsock_virtio_transport; exec socat VSOCK-LISTEN:1024,fork EXEC:/bin/sh"
cmdline = f"""root=/dev/vda rw systemd.run="/bin/sh -c '{agent}'" """
vm = VirtualMachine(kernel=kernel, initramfs=initramfs, disks=[disk], cmdline=cmdline)
with vm, vm.vsock.connect(1024, timeout=300) as guest:
    guest.sendall(f"{command}; exit\n".encode())
    print(guest.makefile().read(), end="")

"""What lies at the reset vector: the few bytes of firmware that a guest may still jump to.

Linux with hardware-reduced ACPI reboots by EFI, and where there is no EFI, in real mode by a jump to
f000:fff0. There it finds a write to the reset register.
"""

from pileus.arch.x86_64 import layout

# mov dx, PORT_POWER; mov al, 1; out dx, al; hlt; jmp to the hlt
CODE = b"\xba" + layout.PORT_POWER.to_bytes(2, "little") + b"\xb0\x01\xee\xf4\xeb\xfd"


def build() -> list[tuple[int, bytes]]:
    """The code, with the GPA it is for."""
    return [(layout.RESET_VECTOR, CODE)]

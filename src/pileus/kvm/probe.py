"""Can this host run stock kernels? Asked before anything is made: nobody waits for a guest that never comes.

A KVM backed by kvm_pvm, on a machine without vmx or svm, interprets kernel-mode guest code at about a
thousandth of the machine's speed and stops at instructions it does not know.
"""

import os

from pileus.errors import HostError

OVERRIDE = "PILEUS_ANY_KVM"  # environment: "1" runs guests on such a KVM all the same


def check_host(device: str = "/dev/kvm", proc: str = "/proc/cpuinfo", modules: str = "/sys/module") -> None:
    """Raises HostError with one sentence where ``device`` is missing, not ours to use, or no use."""
    nested = "; scripts/nested gives a complete KVM in software"
    if not os.path.exists(device):
        raise HostError("use", device, f"this host has no KVM (load kvm_intel or kvm_amd){nested}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise HostError("open", device, "permission denied; join the group that owns it (often kvm)")
    if os.environ.get(OVERRIDE) != "1" and os.path.exists(f"{modules}/kvm_pvm") and not _has_vt(proc):
        raise HostError(
            "run a stock kernel on", device, f"kvm_pvm without vmx or svm interprets guest kernels{nested}"
        )


def _has_vt(proc: str) -> bool:
    """Does the first CPU have VT-x or AMD-V?"""
    with open(proc, encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("flags"):
                return not {"vmx", "svm"}.isdisjoint(line.split())
    return False

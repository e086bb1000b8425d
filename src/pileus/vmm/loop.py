"""The loop under the VMM's name for it: ``pileus.loop`` has it, where back-ends find it as well."""

from pileus.loop import READABLE, WRITABLE, Loop, Timer

__all__ = ["READABLE", "WRITABLE", "Loop", "Timer"]

"""pileus: a virtual machine monitor for KVM.

The names below are those for programs; each is imported when it is first used, for a VM's start needs none.
"""

__version__ = "0.3.0.dev0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.errors import ApiError as ApiError
    from pileus.errors import PileusError as PileusError
    from pileus.sdk.client import Client as Client
    from pileus.sdk.vm import VirtualMachine as VirtualMachine

_HOMES = {
    "ApiError": "pileus.errors",
    "Client": "pileus.sdk.client",
    "PileusError": "pileus.errors",
    "VirtualMachine": "pileus.sdk.vm",
}


if not TYPE_CHECKING:  # else any name would do for mypy

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'pileus' has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

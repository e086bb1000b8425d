"""What a start says on standard output: a title, then six lines that scripts of Cloud Hypervisor know."""

from pileus import log
from pileus.config.model import VmConfig
from pileus.config.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pileus.config.model import VmmConfig


def summary(config: "VmmConfig") -> str:
    """The lines for ``config``, also where it has no VM."""
    vm = config.vm or VmConfig()
    api = config.api_socket
    rows = {
        "API server": api and (api.where if api.fd is None else f"fd {api.fd}"),
        "vCPUs": vm.cpus.boot,
        "Memory": f"{vm.memory.size // MIB} MB",
        "Kernel": vm.payload.kernel,
        "Kernel cmdline": vm.payload.cmdline,
        "Disk(s)": ", ".join(_disks(vm)) or None,
    }
    return "Pileus Guest\n" + "".join(
        f"\t{label}: {log.one_line(str(value))}\n" for label, value in rows.items()
    )


def _disks(vm: VmConfig) -> "Iterator[str]":
    """Each disk by its image, or by the socket of the back-end that has it."""
    for disk in vm.disks:
        yield (disk.socket if disk.vhost_user else disk.path) or ""
    for backend in vm.vhost_user_blk:
        yield backend.sock

"""What a start says on standard output: a title, then six lines that scripts of Cloud Hypervisor know."""

from pileus import log
from pileus.config.model import VmConfig
from pileus.config.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
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
        "Disk(s)": None,
    }
    return "Pileus Guest\n" + "".join(
        f"\t{label}: {log.one_line(str(value))}\n" for label, value in rows.items()
    )

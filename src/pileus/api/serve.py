"""Where the server, the routes and the VMM meet."""

from pileus.api.routes import handle
from pileus.api.server import Server
from pileus.vmm.control import Control

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.model import ApiSocketConfig


def serve(config: "ApiSocketConfig", vmm: Control) -> Server:
    """Serve ``vmm`` to the clients of the socket in ``config``, until it is closed. Raises PileusError."""
    return Server(config, lambda request, respond: handle(vmm, request, respond))

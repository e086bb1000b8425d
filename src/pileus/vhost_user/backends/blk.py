"""A disk, as a back-end offers it: the very device of a VM."""

from pileus.block.open import open_image
from pileus.virtio.devices.blk import Blk, make_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.backends import DiskBackendConfig


def open_disk(config: "DiskBackendConfig") -> Blk:
    """The disk that ``config`` describes. Raises HostError and ConfigError."""
    image = open_image(
        config.path or f"fd {config.fd}",
        readonly=config.readonly,
        direct=config.direct,
        format=config.image_type,
        fd=config.fd,
    )
    return make_disk(
        image,
        config.id or "pileus-blk",
        serial=config.serial or "",
        num_queues=config.num_queues,
        queue_size=config.queue_size,
        wce=config.wce,
    )

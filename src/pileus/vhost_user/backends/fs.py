"""A directory, as a back-end offers it."""

import os

from pileus.errors import HostError
from pileus.fs.identity import Ids
from pileus.fs.session import Session
from pileus.virtio.devices.fs import Fs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.config.backends import DirectoryBackendConfig


def open_directory(config: "DirectoryBackendConfig") -> Fs:
    """The device that ``config`` describes. Raises HostError. This process has no umask from now on."""
    path = config.path or ""
    try:
        root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError("share", path, error) from error
    os.umask(0)  # the guest's kernel has applied its own
    session = Session(
        root,
        _ids(config.uid_map),
        _ids(config.gid_map),
        readonly=config.readonly,
        cache=config.cache,
        xattr=config.xattr,
        locks=config.locks,
    )
    device = Fs(config.id or "pileus-fs", session, config.tag, config.num_queues, config.queue_size)
    device.shared_memory = (config.cache_size,)
    return device


def _ids(given: "tuple[int, ...] | None") -> Ids:
    return Ids(() if given is None else ((given[0], given[1], given[2]),))

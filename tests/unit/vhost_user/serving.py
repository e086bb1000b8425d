"""A back-end of ours on a thread, for tests: it comes and goes while its device's front-ends stay."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from pileus.loop import Loop
from pileus.vhost_user.connection import Server
from pileus.vhost_user.server import BackendServer
from pileus.virtio.device import VirtioDevice

PATIENCE = 60.0


class Echo(VirtioDevice):
    """Gives back what it was sent, in capitals; the bytes of its configuration can be written."""

    id = 42
    queue_sizes = (64, 64)

    def __init__(self) -> None:
        super().__init__("echo0")
        self.config = bytes(range(8))
        self.resets = 0
        self.held: list[object] | None = None  # a list: chains are kept there

    def handle_queue(self, index: int) -> None:
        queue = self.queues[index]
        for chain in queue:
            if self.held is not None:
                self.held.append(chain)
            else:
                queue.push_used(chain, chain.write(chain.read().upper()))

    def write_config(self, offset: int, data: bytes) -> None:
        self.config = self.config[:offset] + data + self.config[offset + len(data) :]

    def reset(self) -> None:
        self.resets += 1


class Serving:
    """``device`` at ``path``, which is closed with it."""

    def __init__(self, device: VirtioDevice, path: Path | str) -> None:
        self.device = device
        self.loop = Loop()
        self._peer = Server(os.fspath(path))
        self.server = BackendServer(device, self._peer, self.loop, self.loop.stop)
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.post(self.loop.stop)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self.server.close()
        self._peer.close()
        self.device.close()
        self.loop.close()

"""virtio-blk: a disk for the guest, from an image of the host. The data path is ``_blk``.

Source: virtio 1.2, 5.2 (Block Device)
"""

import os
from struct import Struct

from pileus import log
from pileus.block.open import open_image
from pileus.errors import HostError
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice
from pileus.virtio.devices._blk import MAX_SEGMENTS, BlkQueue, flush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pileus.block._image import Image
    from pileus.config.model import DiskConfig
    from pileus.virtio.device import State

SEG_MAX = 1 << 2
RO = 1 << 5
BLK_SIZE = 1 << 6
FLUSH = 1 << 9
TOPOLOGY = 1 << 10
CONFIG_WCE = 1 << 11
MQ = 1 << 12
DISCARD = 1 << 13
WRITE_ZEROES = 1 << 14

SECTOR = 512
MAX_SECTORS = 1 << 22  # of one segment, 2 GiB: no request keeps a thread for much longer than others
SERIAL_SIZE = 20
# capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp, alignment_offset,
# min_io_size, opt_io_size, writeback, unused, num_queues, max_discard_sectors, max_discard_seg,
# discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap, unused,
# max_secure_erase_sectors, max_secure_erase_seg, secure_erase_sector_alignment
CONFIG = Struct("<QIIHBBIBBHIBBHIIIIIB3xIII")  # 5.2.4
WRITEBACK = 32  # offset of that field, the only one a driver may write
NO_URING = "PILEUS_NO_IO_URING"  # in the environment: do without


class Blk(VirtioDevice):
    """The disk in ``image``, which it closes in the end; ``serial`` is told to the guest, up to 20 bytes.

    Each of ``num_queues`` queues has a thread of its own while the driver is there. ``threads``: without
    io_uring, which is what happens by itself where the host refuses that. ``wce``: the driver may turn the
    write cache off.
    """

    id = ids.BLOCK
    kicked_in_python = ()

    def __init__(
        self,
        name: str,
        image: "Image",
        *,
        serial: str = "",
        num_queues: int = 1,
        queue_size: int = 128,
        threads: bool = False,
        wce: bool = True,
    ) -> None:
        self.queue_sizes = (queue_size,) * num_queues
        super().__init__(name)
        self.image = image
        self.features = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | MQ | (CONFIG_WCE if wce else 0)
        if image.readonly:
            self.features |= RO
        else:
            self.features |= WRITE_ZEROES | (DISCARD if image.can_discard else 0)
        threads = threads or bool(os.environ.get(NO_URING))
        self.engines = [
            BlkQueue(f"{name}_q{index}", queue, image, os.fsencode(serial), self._gave_up, threads)
            for index, queue in enumerate(self.queues)
        ]
        self._set_writeback(True)

    # -- the life of the driver -------------------------------------------------------------------

    def activate(self) -> None:
        if not self.driver_features & FLUSH:
            self._set_writeback(False)  # a driver that cannot flush has nothing to flush (5.2.6.2)
        self.resume()

    def reset(self) -> None:
        self.pause()
        self._set_writeback(True)

    def pause(self) -> None:
        """Returns when nothing is under way; what the driver offers meanwhile waits for ``resume``."""
        for engine in self.engines:
            engine.stop()

    def resume(self) -> None:
        for engine, queue in zip(self.engines, self.queues, strict=True):
            if queue.active and not self.failed:
                engine.start()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        super().close()
        self.image.close()

    def _gave_up(self, number: int) -> None:
        faults = [engine.fault for engine in self.engines if engine.fault]
        self.fail(faults[0] if faults else f"its queue stopped: {os.strerror(number)}")

    # -- configuration ----------------------------------------------------------------------------

    @property
    def writeback(self) -> bool:
        """Whether a write may be told to be done before it is on stable storage."""
        return bool(self.config[WRITEBACK])

    def write_config(self, offset: int, data: bytes) -> None:
        if not (self.driver_features & CONFIG_WCE and offset <= WRITEBACK < offset + len(data)):
            return
        self._set_writeback(bool(data[WRITEBACK - offset]))
        if not self.writeback and not self.image.readonly:
            try:
                flush(self.image)  # what was written before is as durable as what comes
            except OSError as error:
                log.limited(log.ERROR, f"{self.name}: cannot write {self.image.path} back: {error.strerror}")

    def _set_writeback(self, writeback: bool) -> None:
        for engine in self.engines:
            engine.writethrough = not writeback
        self.config = self._config(writeback)

    def _config(self, writeback: bool) -> bytes:
        image = self.image
        size = self.queue_sizes[0]
        discards = bool(self.features & DISCARD)
        zeroes = bool(self.features & WRITE_ZEROES)
        return CONFIG.pack(
            image.size // SECTOR,
            0,  # segments may be of any size
            max(size - 2, 1),  # beside header and status, and no chain is longer than its queue (2.7.5.3.1)
            0,
            0,
            0,  # no geometry
            image.logical_block,
            (image.physical_block // image.logical_block).bit_length() - 1,
            0,
            image.physical_block // image.logical_block,
            0,
            writeback,
            0,
            len(self.queue_sizes),
            MAX_SECTORS if discards else 0,
            MAX_SEGMENTS if discards else 0,
            image.physical_block // SECTOR if discards else 0,
            MAX_SECTORS if zeroes else 0,
            MAX_SEGMENTS if zeroes else 0,
            zeroes,
            0,
            0,
            0,
        )

    # -- what is to be restored -------------------------------------------------------------------

    def state(self) -> "State":
        return {"writeback": self.writeback}

    def restore(self, state: "State") -> None:
        self._set_writeback(state["writeback"])


def open_disk(config: "DiskConfig", index: int) -> Blk:
    """The disk that ``config`` describes, the ``index``-th. Raises HostError and ConfigError."""
    assert config.path is not None  # by the rules of the configuration
    image = open_image(config.path, readonly=config.readonly, direct=config.direct, format=config.image_type)
    return make_disk(
        image,
        config.id or f"_disk{index}",
        serial=config.serial or "",
        num_queues=config.num_queues,
        queue_size=config.queue_size,
    )


def make_disk(
    image: "Image", name: str, *, serial: str, num_queues: int, queue_size: int, wce: bool = True
) -> Blk:
    """The disk in ``image``, which it owns. Raises HostError for an empty one, and closes it."""
    try:
        if not image.size:
            raise HostError("use", image.path, "a disk has at least one sector of 512 bytes")
        return Blk(name, image, serial=serial, num_queues=num_queues, queue_size=queue_size, wce=wce)
    except BaseException:
        image.close()
        raise
